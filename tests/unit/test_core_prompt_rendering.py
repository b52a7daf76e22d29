"""Prompt rendering: from a conversation to the token ids that inference and the learner share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core import prompt_rendering
from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import (
    ImageSizing,
    RenderingError,
    encode_action,
    encode_text,
    expand_images,
    render_prompt,
)
from deskrl.learner.policy.architectures.chat_format import GLM_CHAT
from deskrl.learner.policy.tiny_model import build_tiny_model, build_tokenizer
from deskrl.proto.v1 import inference_pb2 as pb

CORPUS = ["Action: click(start_box='(100,80)')", "Thought: I open the editor and type hello."] * 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, seed=0, image_size=(280, 168), corpus=CORPUS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def message(role: int, *contents: pb.Content) -> pb.ChatMessage:
    return pb.ChatMessage(role=pb.MessageRole.Name(role), contents=contents)


def text(value: str) -> pb.Content:
    return pb.Content(text=value)


def image(name: str) -> pb.Content:
    return pb.Content(image_hash=name)


def ids(*values: int) -> pb.Content:
    return pb.Content(token_ids=pb.TokenIds(ids=values))


SYSTEM, USER, ASSISTANT = pb.MESSAGE_ROLE_SYSTEM, pb.MESSAGE_ROLE_USER, pb.MESSAGE_ROLE_ASSISTANT


def test_a_text_conversation_is_rendered_as_by_the_chat_template(tokenizer: Any) -> None:
    messages = [
        message(SYSTEM, text("I open the editor.")),
        message(USER, text("type hello"), image("a"), text("type")),
    ]
    plain = [
        {"role": "system", "content": "I open the editor."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "type hello"}, {"type": "image"}, {"type": "text", "text": "type"}],
        },
    ]
    expected = tokenizer.apply_chat_template(plain, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert list(render_prompt(messages, tokenizer).ids) == list(expected)


def test_each_screenshot_is_one_image_token(tokenizer: Any) -> None:
    prompt = render_prompt([message(USER, image("a"), image("b")), message(USER, image("c"))], tokenizer)
    assert prompt.image_hashes == ("a", "b", "c")
    assert prompt.ids.count(prompt_rendering.image_token_id(tokenizer)) == 3


def test_sampled_ids_are_inserted_unchanged(tokenizer: Any) -> None:
    # Three letters that the tokenizer would encode as fewer tokens.
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "hel"]
    assert encode_text("hel", tokenizer) != letters
    prompt = render_prompt([message(USER, text("go")), message(ASSISTANT, ids(*letters))], tokenizer)
    assert tuple(letters) in {prompt.ids[i : i + 3] for i in range(len(prompt.ids))}


@pytest.mark.parametrize("stopped", [True, False], ids=["end-of-turn token", "max_tokens"])
def test_a_prompt_extends_prompt_and_action_of_the_previous_step(tokenizer: Any, stopped: bool) -> None:
    end = prompt_rendering.end_of_turn_id(tokenizer)
    messages = [message(SYSTEM, text("You act.")), message(USER, text("open"), image("a"))]
    action = [300, 301, *([end] if stopped else [])]
    before = render_prompt(messages, tokenizer).ids
    after = render_prompt([*messages, message(ASSISTANT, ids(*action)), message(USER, image("b"))], tokenizer).ids
    assert after[: len(before) + len(action)] == (*before, *action)
    rest = after[len(before) + len(action) :]
    assert rest.count(end) == (1 if stopped else 2), "each message is closed exactly once"


@pytest.mark.parametrize("stopped", [True, False], ids=["end-of-turn token", "max_tokens"])
def test_with_glm_the_header_of_the_next_turn_ends_an_action_and_is_not_repeated(stopped: bool) -> None:
    tokenizer = build_tokenizer(CORPUS, 9, 512, GLM_CHAT)
    end = prompt_rendering.end_of_turn_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == "<|user|>" != tokenizer.eos_token
    suppressed = prompt_rendering.suppressed_ids(tokenizer, len(tokenizer))
    assert end not in suppressed and tokenizer.eos_token_id in suppressed
    messages = [message(SYSTEM, text("You act.")), message(USER, text("open"), image("a"))]
    action = [30, 31, *([end] if stopped else [])]
    before = render_prompt(messages, tokenizer).ids
    after = render_prompt([*messages, message(ASSISTANT, ids(*action)), message(USER, image("b"))], tokenizer).ids
    assert after[: len(before) + len(action)] == (*before, *action)
    assert after.count(end) == 2 and after.count(prompt_rendering.image_token_id(tokenizer)) == 2
    assert "[gMASK]<sop><|system|>\nYou act.<|user|>\nopen<|begin_of_image|>" in tokenizer.decode(before)


def test_a_scripted_action_has_the_same_tokens_in_history_and_in_training(tokenizer: Any) -> None:
    messages = [message(USER, text("open"), image("a"))]
    script = "Action: click(start_box='(100,80)')"
    before = render_prompt(messages, tokenizer).ids
    after = render_prompt([*messages, message(ASSISTANT, text(script)), message(USER, image("b"))], tokenizer).ids
    action = encode_action(script, tokenizer)
    assert after[: len(before) + len(action)] == (*before, *action)


@given(st.text(max_size=40), st.sampled_from(["<|image_pad|>", "<|im_end|>", "<|im_start|>system", "<|vision_start|>"]))
def test_text_never_becomes_a_special_token(tokenizer: Any, around: str, special: str) -> None:
    written = around + special + around
    found = encode_text(written, tokenizer)
    assert not set(found) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(found) == written
    prompt = render_prompt([message(USER, text(written), image("a"))], tokenizer)
    assert prompt.ids.count(prompt_rendering.image_token_id(tokenizer)) == 1


def test_coordinate_marks_are_tokens_in_prompts_and_scripted_actions(tokenizer: Any) -> None:
    start, end = (tokenizer.convert_tokens_to_ids(f"<|box_{side}|>") for side in ("start", "end"))
    found = encode_action("click(start_box='<|box_start|>(100,80)<|box_end|>')", tokenizer)
    assert (found.count(start), found.count(end)) == (1, 1)
    assert tokenizer.decode(found[:-1], skip_special_tokens=True) == "click(start_box='(100,80)')"
    unknown = encode_text("<|quad_start|>", tokenizer)
    assert tokenizer.decode(unknown) == "<|quad_start|>", "a tokenizer without the mark encodes its characters"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [pb.ChatMessage(contents=[text("no role")])],
        [message(USER)],
        [message(USER, pb.Content())],
        [message(USER, ids(300))],
        [message(ASSISTANT, text("and"), ids(300))],
        [message(ASSISTANT, ids())],
    ],
    ids=["no messages", "no role", "no content", "empty content", "ids of a user", "ids and text", "no ids"],
)
def test_a_malformed_conversation_is_rejected(tokenizer: Any, messages: list[pb.ChatMessage]) -> None:
    with pytest.raises(RenderingError):
        render_prompt(messages, tokenizer)


def test_an_image_token_without_a_screenshot_is_rejected(tokenizer: Any) -> None:
    with pytest.raises(RenderingError, match="1 image tokens for 0 screenshots"):
        render_prompt([message(ASSISTANT, ids(prompt_rendering.image_token_id(tokenizer)))], tokenizer)


def test_image_tokens_are_repeated_for_all_tokens_of_an_image() -> None:
    assert expand_images([1, 9, 2, 9], image_token_id=9, tokens_per_image=[2, 3]) == [1, 9, 9, 2, 9, 9, 9]
    with pytest.raises(ValueError, match="1 image tokens for 2 screenshots"):
        expand_images([9], image_token_id=9, tokens_per_image=[1, 1])


@given(st.integers(28, 4000), st.integers(28, 4000), st.sampled_from([(3136, 1_003_520), (141_120, 141_120)]))
def test_images_are_scaled_as_by_the_processor(width: int, height: int, bounds: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    sizing = ImageSizing(patch_size=14, merge_size=2, min_pixels=bounds[0], max_pixels=bounds[1])
    expected_height, expected_width = smart_resize(height, width, 28, *bounds)
    assert sizing.scaled_size(width, height) == (expected_width, expected_height)
    assert sizing.num_tokens(width, height) == expected_width * expected_height // 28**2


def test_special_tokens_except_the_end_of_turn_are_suppressed(tokenizer: Any, model_folder: Path) -> None:
    suppressed = prompt_rendering.suppressed_ids(tokenizer, prompt_rendering.read_vocab_size(model_folder) + 2)
    names = set(tokenizer.convert_ids_to_tokens(suppressed[:-2]))
    assert {"<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|vision_start|>", "<|endoftext|>"} <= names
    assert not names & {"<|im_end|>", "<|box_start|>"}
    assert suppressed[-2:] == (len(tokenizer), len(tokenizer) + 1), "ids beyond the vocabulary"


def test_the_processor_hash_depends_on_settings_not_on_file_bytes(
    tokenizer: Any, model_folder: Path, tmp_path: Path
) -> None:
    original = prompt_rendering.processor_hash(model_folder, tokenizer)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((model_folder / name).read_text().replace("\n", " "))
    assert prompt_rendering.processor_hash(tmp_path, tokenizer) == original
    changed = (model_folder / "preprocessor_config.json").read_text().replace('"merge_size": 2', '"merge_size": 4')
    (tmp_path / "preprocessor_config.json").write_text(changed)
    assert prompt_rendering.processor_hash(tmp_path, tokenizer) != original


def test_a_model_without_an_image_processor_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match="no image processor found"):
        prompt_rendering.read_image_sizing(tmp_path)
