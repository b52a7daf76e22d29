"""What the policy is shown: prompts, contexts, and coordinates between the screen and the image that it sees."""

import functools
import io
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.conversation import Conversation, make_agent
from deskrl.actor.agent.grammar import FormatError, Turn
from deskrl.core.config import AgentConfig
from deskrl.core.errors import UserError
from deskrl.core.families import FAMILIES, FamilyName
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import inference_pb2

SYSTEM, USER, ASSISTANT = (
    inference_pb2.MESSAGE_ROLE_SYSTEM,
    inference_pb2.MESSAGE_ROLE_USER,
    inference_pb2.MESSAGE_ROLE_ASSISTANT,
)


def screen(shade: int, size: tuple[int, int] = (1280, 720)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 0))


def converse(config: AgentConfig, num_turns: int) -> tuple[Conversation, list[str]]:
    """A conversation that has seen `num_turns` + 1 screens, and the hashes of them."""
    conversation = make_agent(config).begin("Press {that} button.")
    hashes = []
    for index in range(num_turns):
        hashes.append(conversation.observe(screen(index)).hash)
        conversation.respond([100 + index, 7])
    return conversation, [*hashes, conversation.observe(screen(num_turns)).hash]


def kinds(messages: list[inference_pb2.ChatMessage]) -> list[str]:
    return [str(message.contents[0].WhichOneof("kind")) for message in messages]


def test_the_prompt_is_system_then_task_then_screens_and_answers_in_turns() -> None:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_prompt_names_every_action_and_ends_with_the_instruction(family: FamilyName) -> None:
    words = converse(AgentConfig(family=family, language="German"), 0)[0].prompt().messages[1].contents[0].text
    for name in ["click", "left_double", "right_single", "drag", "hotkey", "type", "scroll", "wait", "finished"]:
        assert f"\n{name}(" in words
    assert "call_user()" in words
    assert " in German." in words
    assert ("<think>" in words) == (family == "ui_tars_2")
    assert ("<|box_start|>(x1,y1)<|box_end|>" in words) == (family == "ui_tars_1_0")
    assert words.rstrip().endswith("## User Instruction\nPress {that} button.")


def test_the_brief_prompt_is_the_instruction() -> None:
    messages = converse(AgentConfig(prompt="brief"), 0)[0].prompt().messages
    assert messages[1].contents[0].text == "Press {that} button."
    assert len(messages[0].contents[0].text) < 20


def test_a_prompt_of_ones_own_is_told_word_by_word(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Do {instruction} in {language}, with click(start_box='<|box_start|>(x,y)<|box_end|>') and {}.")
    words = converse(AgentConfig(prompt_file=path), 0)[0].prompt().messages[1].contents[0].text
    assert words == "Do Press {that} button. in English, with click(start_box='<|box_start|>(x,y)<|box_end|>') and {}."
    (tmp_path / "blank.txt").write_text("Do something.")
    for name, told in (("blank.txt", "has no {instruction}"), ("none.txt", "cannot be read")):
        with pytest.raises(UserError, match=told):
            make_agent(AgentConfig(prompt_file=tmp_path / name))
    with pytest.raises(ValueError, match="and so does prompt_file"):
        AgentConfig(prompt="brief", prompt_file=path)


def test_prompts_of_the_context_episode_extend_one_another() -> None:
    conversation = make_agent(AgentConfig(context="episode")).begin("Press it.")
    before: list[inference_pb2.ChatMessage] = []
    for index in range(20):
        conversation.observe(screen(index))
        prompt = conversation.prompt()
        assert prompt.messages[: len(before)] == before
        assert len(prompt.messages) > len(before)
        before = prompt.messages
        conversation.respond([index])


def test_the_context_window_keeps_all_answers_and_the_last_screens() -> None:
    conversation, hashes = converse(AgentConfig(context="window", window_images=2), 4)
    prompt = conversation.prompt()
    assert list(prompt.images) == hashes[-2:]
    assert kinds(prompt.messages) == ["text", "text", *["token_ids"] * 3, "image_hash", "token_ids", "image_hash"]


def test_a_scripted_answer_stays_text() -> None:
    conversation = make_agent(AgentConfig()).begin("Press it.")
    conversation.observe(screen(0))
    conversation.respond("Thought: Press it.\nAction: wait()")
    conversation.observe(screen(1))
    assert conversation.prompt().messages[3].contents[0].text == "Thought: Press it.\nAction: wait()"


@pytest.mark.parametrize("point", ["(1,2)", "( 1, 2 )", "<|box_start|>(1,2)<|box_end|>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_came_as_text_has_the_marks_that_decoding_drops(family: FamilyName, point: str) -> None:
    conversation = make_agent(AgentConfig(family=family)).begin("Press it.")
    conversation.observe(screen(0))
    conversation.respond(f"Action: click(start_box='{point}')")
    marked = f"<|box_start|>{point}<|box_end|>" if family == "ui_tars_1_0" and point.startswith("(") else point
    assert conversation.prompt().messages[3].contents[0].text == f"Action: click(start_box='{marked}')"


def test_a_screenshot_is_scaled_encoded_and_named_by_its_bytes() -> None:
    conversation = make_agent(AgentConfig(image_width=504, image_height=280)).begin("Press it.")
    seen = conversation.observe(screen(9))
    assert seen.hash == image_hash(seen.data)
    image = Image.open(io.BytesIO(seen.data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (504, 280))
    assert make_agent(AgentConfig(image_width=504, image_height=280)).begin("Else.").observe(screen(9)) == seen


def test_without_a_size_a_screenshot_stays_as_it_is() -> None:
    seen = make_agent(AgentConfig()).begin("Press it.").observe(screen(9))
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
    assert FAMILIES["ui_tars_1_5"].span(*sent) == seen


def test_coordinates_are_those_of_the_image_as_the_model_sees_it() -> None:
    conversation = make_agent(AgentConfig()).begin("Press it.")
    conversation.observe(screen(0, (1920, 1080)))
    assert conversation.parse("Action: click(start_box='(966,546)')").action == Action(ActionKind.CLICK, x=960, y=540)


@pytest.mark.parametrize("family", ["ui_tars_1_0", "ui_tars_2"])
def test_relative_coordinates_are_thousandths_of_the_screen_whatever_the_model_sees(family: FamilyName) -> None:
    for width, height in [(None, None), (504, 280)]:
        conversation = make_agent(AgentConfig(family=family, image_width=width, image_height=height)).begin("Press it.")
        conversation.observe(screen(0, (1920, 1080)))
        middle, corner = (conversation.parse(f"Action: click(point='{at} {at}')").action for at in (500, 1000))
        assert (middle.x, middle.y, corner.x, corner.y) == (960, 540, 1919, 1079)
        with pytest.raises(FormatError, match=r"\(1001,3\) is outside coordinates of 1000×1000"):
            conversation.parse("Action: click(start_box='(1001,3)')")


def test_the_far_edge_is_on_the_screen_and_what_lies_beyond_is_refused() -> None:
    conversation = make_agent(AgentConfig(image_width=504, image_height=280)).begin("Press it.")
    conversation.observe(screen(0))
    assert conversation.parse("Action: click(start_box='(504,280)')").action == Action(ActionKind.CLICK, x=1279, y=719)
    with pytest.raises(FormatError, match=r"\(4890,1000\) is outside the image of 504×280"):
        conversation.parse("Action: click(start_box='(4890,1000)')")


@functools.cache
def shown(family: FamilyName, size: tuple[int | None, int | None]) -> Conversation:
    """A conversation that has seen a screen of 1280 x 720."""
    conversation = make_agent(AgentConfig(family=family, image_width=size[0], image_height=size[1])).begin("Press it.")
    conversation.observe(screen(0))
    return conversation


@pytest.mark.parametrize("family", get_args(FamilyName))
@settings(deadline=None)
@given(
    x=st.integers(0, 1279),
    y=st.integers(0, 719),
    size=st.sampled_from([(504, 280), (1280, 720), (448, 252), (None, None)]),
)
def test_a_demonstration_points_where_the_solution_does(
    family: FamilyName, x: int, y: int, size: tuple[int | None, int | None]
) -> None:
    conversation = shown(family, size)
    said = conversation.render(Turn("Press it.", Action(ActionKind.CLICK, x=x, y=y)))
    meant = conversation.parse(said).action
    pixel = 1280 / 1000 if FAMILIES[family].relative else 1280 / (size[0] or 1280)
    assert abs(meant.x - x) <= pixel / 2 + 1
    assert abs(meant.y - y) <= pixel / 2 + 1
