"""Conversations: prompts, contexts, and the mapping of coordinates between the screen and the model's image."""

import io
from pathlib import Path

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.ui_tars import UiTars15
from deskrl.core.config import AgentConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import inference_pb2

LANGUAGES = ["ui_tars_1_0", "ui_tars_1_5", "ui_tars_2"]
SYSTEM, USER, ASSISTANT = (
    inference_pb2.MESSAGE_ROLE_SYSTEM,
    inference_pb2.MESSAGE_ROLE_USER,
    inference_pb2.MESSAGE_ROLE_ASSISTANT,
)


def screen(shade: int, size: tuple[int, int] = (1280, 720)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 0))


def converse(config: AgentConfig, num_steps: int) -> tuple[Conversation, list[str]]:
    """Return a conversation with `num_steps` + 1 screenshots, and the hashes of these."""
    conversation = Agent(config).start_conversation("Press {that} button.")
    hashes = []
    for index in range(num_steps):
        hashes.append(conversation.observe(screen(index)).hash)
        conversation.respond([100 + index, 7])
    return conversation, [*hashes, conversation.observe(screen(num_steps)).hash]


def kinds(messages: list[inference_pb2.ChatMessage]) -> list[str]:
    return [str(message.contents[0].WhichOneof("kind")) for message in messages]


def test_the_prompt_is_system_then_task_then_alternating_screenshots_and_responses() -> None:
    conversation, hashes = converse(AgentConfig(context="episode"), 2)
    prompt = conversation.prompt()
    assert [message.role for message in prompt.messages] == [SYSTEM, USER, USER, ASSISTANT, USER, ASSISTANT, USER]
    assert kinds(prompt.messages) == [
        "text",
        "text",
        "image_hash",
        "token_ids",
        "image_hash",
        "token_ids",
        "image_hash",
    ]
    assert list(prompt.images) == hashes
    assert list(prompt.messages[3].contents[0].token_ids.ids) == [100, 7]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_full_prompt_names_every_action_and_ends_with_the_instruction(language: str) -> None:
    text = (
        converse(AgentConfig(action_language=language, language="German"), 0)[0].prompt().messages[1].contents[0].text
    )
    for name in ["click", "left_double", "right_single", "drag", "hotkey", "type", "scroll", "wait", "finished"]:
        assert f"\n{name}(" in text
    assert "call_user()" in text
    assert " in German." in text
    assert ("<think>" in text) == (language == "ui_tars_2")
    assert ("<|box_start|>(x1,y1)<|box_end|>" in text) == (language == "ui_tars_1_0")
    assert text.rstrip().endswith("## User Instruction\nPress {that} button.")


def test_the_brief_prompt_is_only_the_instruction() -> None:
    messages = converse(AgentConfig(prompt="brief"), 0)[0].prompt().messages
    assert messages[1].contents[0].text == "Press {that} button."
    assert len(messages[0].contents[0].text) < 20


def test_a_prompt_file_is_used_literally_except_for_its_two_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Do {instruction} in {language}, with click(start_box='<|box_start|>(x,y)<|box_end|>') and {}.")
    text = converse(AgentConfig(prompt_file=path), 0)[0].prompt().messages[1].contents[0].text
    assert text == "Do Press {that} button. in English, with click(start_box='<|box_start|>(x,y)<|box_end|>') and {}."
    (tmp_path / "blank.txt").write_text("Do something.")
    for name, problem in (("blank.txt", "has no {instruction}"), ("none.txt", "cannot be read")):
        with pytest.raises(UserError, match=problem):
            Agent(AgentConfig(prompt_file=tmp_path / name))
    with pytest.raises(ValueError, match="prompt_file exclude each other"):
        AgentConfig(prompt="brief", prompt_file=path)


def test_prompts_of_the_context_episode_extend_one_another() -> None:
    conversation = Agent(AgentConfig(context="episode")).start_conversation("Press it.")
    before: list[inference_pb2.ChatMessage] = []
    for index in range(20):
        conversation.observe(screen(index))
        prompt = conversation.prompt()
        assert prompt.messages[: len(before)] == before
        assert len(prompt.messages) > len(before)
        before = prompt.messages
        conversation.respond([index])


def test_a_screenshot_without_a_response_is_replaced_by_the_next_one() -> None:
    conversation, hashes = converse(AgentConfig(context="episode"), 1)
    newer = conversation.observe(screen(99)).hash
    assert conversation.prompt().images == (hashes[0], newer)
    assert len(conversation.prompt().messages) == 5


def test_the_context_window_keeps_all_responses_and_the_last_screenshots() -> None:
    conversation, hashes = converse(AgentConfig(context="window", window_images=2), 4)
    prompt = conversation.prompt()
    assert list(prompt.images) == hashes[-2:]
    assert kinds(prompt.messages) == ["text", "text", *["token_ids"] * 3, "image_hash", "token_ids", "image_hash"]


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ((3, 5), ["0", "01", "012", "0123", "01234", "345", "3456", "34567", "678", "6789"]),
        ((1, 2), ["0", "01", "2", "23", "4", "45", "6", "67", "8", "89"]),
        ((1, 4), ["0", "01", "012", "0123", "4", "45", "456", "4567", "8", "89"]),
        ((2, 3), ["0", "01", "012", "23", "234", "45", "456", "67", "678", "89"]),
        ((9, 12), ["0", "01", "012", "0123", "01234", "012345", "0123456", "01234567", "012345678", "0123456789"]),
    ],
)
def test_the_context_segment_grows_to_one_bound_and_falls_back_to_the_other(
    bounds: tuple[int, int], shown: list[str]
) -> None:
    conversation = Agent(AgentConfig(context="segment", segment_images=bounds)).start_conversation("Press it.")
    names: dict[str, str] = {}
    before: list[inference_pb2.ChatMessage] = []
    for index, expected in enumerate(shown):
        names[conversation.observe(screen(index)).hash] = str(index)
        prompt = conversation.prompt()
        assert "".join(names[image] for image in prompt.images) == expected
        in_messages = [content.image_hash for message in prompt.messages for content in message.contents]
        assert tuple(filter(None, in_messages)) == prompt.images
        assert kinds(prompt.messages).count("token_ids") == index, "all responses are kept"
        is_extended = index > 0 and expected.startswith(shown[index - 1])
        assert (prompt.messages[: len(before)] == before) == (is_extended or index == 0)
        before = prompt.messages
        conversation.respond([index])


def test_a_screenshot_that_replaces_another_does_not_drop_any() -> None:
    conversation, hashes = converse(AgentConfig(context="segment", segment_images=(2, 3)), 2)
    assert list(conversation.prompt().images) == hashes
    newer = conversation.observe(screen(99)).hash
    assert list(conversation.prompt().images) == [*hashes[:2], newer]


@pytest.mark.parametrize("bounds", [(5, 3), (4, 4)])
def test_segment_bounds_that_cross_or_are_equal_are_rejected(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the first bound must be less than the second"):
        AgentConfig(segment_images=bounds)


def test_a_scripted_response_is_kept_as_text() -> None:
    conversation = Agent(AgentConfig()).start_conversation("Press it.")
    conversation.observe(screen(0))
    conversation.respond("Thought: Press it.\nAction: wait()")
    conversation.observe(screen(1))
    assert conversation.prompt().messages[3].contents[0].text == "Thought: Press it.\nAction: wait()"


@pytest.mark.parametrize("point", ["(1,2)", "( 1, 2 )", "<|box_start|>(1,2)<|box_end|>"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_point_markup_that_decoding_drops_is_restored_in_responses_received_as_text(
    language: str, point: str
) -> None:
    conversation = Agent(AgentConfig(action_language=language)).start_conversation("Press it.")
    conversation.observe(screen(0))
    conversation.respond(f"Action: click(start_box='{point}')")
    marked = f"<|box_start|>{point}<|box_end|>" if language == "ui_tars_1_0" and point.startswith("(") else point
    assert conversation.prompt().messages[3].contents[0].text == f"Action: click(start_box='{marked}')"


def test_a_screenshot_is_scaled_encoded_as_png_and_named_by_its_hash() -> None:
    conversation = Agent(AgentConfig(image_width=504, image_height=280)).start_conversation("Press it.")
    seen = conversation.observe(screen(9))
    assert seen.hash == image_hash(seen.data)
    image = Image.open(io.BytesIO(seen.data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (504, 280))
    assert Agent(AgentConfig(image_width=504, image_height=280)).start_conversation("Else.").observe(screen(9)) == seen


@pytest.mark.parametrize(("image_width", "image_height"), [(None, None), (504, 280)])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_scroll_without_a_point_turns_the_wheel_at_the_centre_of_the_screen(
    language: str, image_width: int | None, image_height: int | None
) -> None:
    config = AgentConfig(action_language=language, image_width=image_width, image_height=image_height)
    conversation = Agent(config).start_conversation("Scroll.")
    conversation.observe(screen(0))
    action = conversation.parse("Thought: More.\nAction: scroll(direction='down')").action
    assert action == Action(ActionKind.SCROLL, x=640, y=360, scroll_y=5)


def test_without_a_configured_size_a_screenshot_is_not_scaled() -> None:
    seen = Agent(AgentConfig()).start_conversation("Press it.").observe(screen(9))
    assert Image.open(io.BytesIO(seen.data)).size == (1280, 720)


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ((1920, 1080), (1932, 1092)),
        ((1280, 720), (1288, 728)),
        ((800, 450), (812, 448)),
        ((504, 280), (504, 280)),
        ((10, 10), (56, 56)),
        ((8000, 8000), (3584, 3584)),
    ],
)
def test_the_model_sees_sides_in_multiples_of_28(sent: tuple[int, int], seen: tuple[int, int]) -> None:
    assert UiTars15().coordinate_range(*sent) == seen


def test_absolute_coordinates_refer_to_the_image_as_the_model_sees_it() -> None:
    conversation = Agent(AgentConfig()).start_conversation("Press it.")
    conversation.observe(screen(0, (1920, 1080)))
    assert conversation.parse("Action: click(start_box='(966,546)')").action == Action(ActionKind.CLICK, x=960, y=540)


@pytest.mark.parametrize("language", ["ui_tars_1_0", "ui_tars_2"])
def test_relative_coordinates_are_thousandths_of_the_screen_for_every_image_size(language: str) -> None:
    for width, height in [(None, None), (504, 280)]:
        conversation = Agent(
            AgentConfig(action_language=language, image_width=width, image_height=height)
        ).start_conversation("Press it.")
        conversation.observe(screen(0, (1920, 1080)))
        middle, corner = (conversation.parse(f"Action: click(point='{at} {at}')").action for at in (500, 1000))
        assert (middle.x, middle.y, corner.x, corner.y) == (960, 540, 1919, 1079)
        with pytest.raises(FormatError, match=r"\(1001,3\) is outside the coordinate range of 1000×1000"):
            conversation.parse("Action: click(start_box='(1001,3)')")


def test_a_point_on_the_far_edge_is_accepted_and_a_point_beyond_it_is_rejected() -> None:
    conversation = Agent(AgentConfig(image_width=504, image_height=280)).start_conversation("Press it.")
    conversation.observe(screen(0))
    assert conversation.parse("Action: click(start_box='(504,280)')").action == Action(ActionKind.CLICK, x=1279, y=719)
    with pytest.raises(FormatError, match=r"\(4890,1000\) is outside the image of 504×280"):
        conversation.parse("Action: click(start_box='(4890,1000)')")
