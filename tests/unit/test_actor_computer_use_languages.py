"""Action languages of Qwen, OpenCUA, Anthropic and OpenAI: accepted forms, reasons of rejection, and linear time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, FormatError, PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.guest.keysyms import keysym_of_name
from deskrl.core.config import AgentConfig

FILES = {
    "qwen3_vl": "action_outputs_qwen.json",
    "opencua": "action_outputs_opencua.json",
    "anthropic_computer_use": "action_outputs_anthropic.json",
    "openai_computer_use": "action_outputs_openai.json",
}
OUTPUTS: dict[str, list[dict[str, Any]]] = {
    language: json.loads((Path(__file__).parent / file).read_text(encoding="utf-8")) for language, file in FILES.items()
}
"""Outputs in the forms of public documentation and code, each with its source and its reading or error."""
RANGE = (1280, 720)


def language_of(name: str, **options: Any) -> ActionLanguage:
    return select_language(AgentConfig(action_language=name, action_language_options=options))


def converse(name: str) -> Conversation:
    """Return a conversation that shows a screen of 1280 x 720 pixels."""
    conversation = Agent(AgentConfig(action_language=name)).start_conversation("Press it.")
    conversation.observe(Image.new("RGB", (1280, 720)))
    return conversation


@pytest.mark.parametrize("language", FILES)
def test_each_table_of_outputs_names_its_sources_and_reasons(language: str) -> None:
    outputs = OUTPUTS[language]
    assert len(outputs) >= 40 and len({output["output"] for output in outputs}) == len(outputs)
    lacks = {ActionKind.TRIPLE_CLICK} if language == "openai_computer_use" else set()
    assert {output["action"]["kind"] for output in outputs if "action" in output} == set(ActionKind) - lacks
    assert all(output["source"] for output in outputs)
    assert all(("action" in output) != bool(output.get("error") and output.get("why")) for output in outputs)


@pytest.mark.parametrize(
    ("language", "output"),
    [(language, output) for language, outputs in OUTPUTS.items() for output in outputs],
    ids=lambda value: value if isinstance(value, str) else repr(value["output"])[-60:],
)
def test_outputs_are_read_as_the_tables_state(language: str, output: dict[str, Any]) -> None:
    if "action" in output:
        response = language_of(language).parse(output["output"], RANGE)
        assert response.action.to_record() == output["action"]
        assert response.starts_at_pointer == output.get("starts_at_pointer", False)
    else:
        with pytest.raises(FormatError) as error:
            language_of(language).parse(output["output"], RANGE)
        assert output["error"] in str(error.value)


def test_every_key_of_the_tables_can_be_pressed() -> None:
    pytest.importorskip("Xlib", reason="python-xlib is not installed: pip install deskrl[actor]")
    outputs = [output for table in OUTPUTS.values() for output in table]
    keys = {key for output in outputs for key in output.get("action", {}).get("keys", ())}
    assert len(keys) >= 20
    assert {key for key in keys if keysym_of_name(key) is None} == set()


@pytest.mark.parametrize(
    ("language", "output", "thought"),
    [
        ("qwen3_vl", "<think>\nIt is\nfilled in.\n</think>\n<tool_call>{}</tool_call>", "It is\nfilled in."),
        ("qwen3_vl", "<think>Long.</think>\n\nShort.\n<tool_call>{}</tool_call>", "Short."),
        ("opencua", "## Thought:\nIt is\nfilled in.\n\n## Action:\nClick.\n\n## Code:\n{}", "It is\nfilled in."),
        ("opencua", "# Step 2:\n## Observation:\nA form.\n## Thought:\nDone.\n## Action:\nClick.\n{}", "Done."),
        ("opencua", "It is filled in.\n{}", "It is filled in."),
        ("anthropic_computer_use", "It is\n\nfilled in.\n{}", "It is\n\nfilled in."),
    ],
)
def test_the_thought_is_the_text_before_the_action(language: str, output: str, thought: str) -> None:
    click = {
        "qwen3_vl": '{"name": "computer_use", "arguments": {"action": "wait"}}',
        "opencua": "```python\ncomputer.wait()\n```",
        "anthropic_computer_use": '{"type": "tool_use", "name": "computer", "input": {"action": "screenshot"}}',
    }
    assert language_of(language).parse(output.replace("{}", click[language]), RANGE).thought == thought


def test_an_action_without_a_point_happens_where_the_last_action_left_the_pointer() -> None:
    conversation = converse("anthropic_computer_use")
    block = '{"type": "tool_use", "name": "computer", "input": %s}'
    with pytest.raises(FormatError, match="click has no point, and no earlier action has moved the pointer"):
        conversation.parse(block % '{"action": "left_click"}')
    scroll = conversation.parse(block % '{"action": "scroll", "scroll_direction": "down", "scroll_amount": 2}').action
    assert (scroll.x, scroll.y) == (640, 360)
    conversation.parse(block % '{"action": "mouse_move", "coordinate": [10, 20]}')
    conversation.parse(block % '{"action": "type", "text": "a"}')
    click = conversation.parse(block % '{"action": "left_click"}').action
    assert click == Action(ActionKind.CLICK, x=10, y=20)
    drag = conversation.parse(block % '{"action": "left_click_drag", "coordinate": [30, 40]}').action
    assert drag == Action(ActionKind.DRAG, x=10, y=20, end_x=30, end_y=40)
    click = conversation.parse(block % '{"action": "right_click"}').action
    assert click == Action(ActionKind.RIGHT_CLICK, x=30, y=40)


@pytest.mark.parametrize(
    ("language", "frame"),
    [
        ("qwen3_vl", (1000, 1000)),
        ("qwen2_5_vl", (1288, 728)),
        ("opencua", (1288, 728)),
        ("anthropic_computer_use", (1280, 720)),
        ("openai_computer_use", (1280, 720)),
    ],
)
def test_coordinates_have_the_frame_that_the_models_use(language: str, frame: tuple[int, int]) -> None:
    assert language_of(language).coordinate_range(1280, 720) == frame
    middle = Action(ActionKind.CLICK, x=frame[0] // 2, y=frame[1] // 2)
    text = language_of(language).render(PolicyResponse("It is there.", middle))
    conversation = converse(language)
    assert conversation.parse(text).action == Action(ActionKind.CLICK, x=640, y=360)
    outside = language_of(language).render(PolicyResponse("It is there.", Action(ActionKind.CLICK, x=frame[0] + 1)))
    with pytest.raises(FormatError, match="is outside"):
        conversation.parse(outside)


def test_keys_that_are_held_and_repeated_are_kept_by_languages_that_have_them() -> None:
    held = [
        Action(kind, x=1, y=2, keys=("ctrl", "shift"))
        for kind in (ActionKind.CLICK, ActionKind.TRIPLE_CLICK, ActionKind.MOVE)
    ]
    held += [Action(ActionKind.SCROLL, x=1, y=2, scroll_y=-3, keys=("ctrl",))]
    held += [Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4, keys=("alt",))]
    repeated = Action(ActionKind.HOTKEY, keys=("down",), repeat=4)
    pressed_long = Action(ActionKind.HOTKEY, keys=("shift", "a"), seconds=2.0)
    for name, actions in (
        ("opencua", [*held, repeated]),
        ("anthropic_computer_use", [*held, repeated, pressed_long]),
        ("openai_computer_use", [action for action in held if action.kind is not ActionKind.TRIPLE_CLICK]),
    ):
        for action in actions:
            text = language_of(name).render(PolicyResponse("So.", action))
            assert language_of(name).parse(text, RANGE) == PolicyResponse("So.", action), text


@pytest.mark.parametrize(
    ("language", "action"),
    [
        ("qwen3_vl", Action(ActionKind.CLICK, keys=("ctrl",))),
        ("qwen3_vl", Action(ActionKind.HOTKEY, keys=("down",), repeat=2)),
        ("openai_computer_use", Action(ActionKind.HOTKEY, keys=("down",), repeat=2)),
        ("openai_computer_use", Action(ActionKind.TRIPLE_CLICK)),
        ("ui_tars_2", Action(ActionKind.MIDDLE_CLICK)),
    ],
)
def test_an_action_that_a_language_cannot_express_is_not_rendered(language: str, action: Action) -> None:
    with pytest.raises(ValueError, match=action.kind.value):
        language_of(language).render(PolicyResponse("So.", action))


def test_a_safety_check_is_acknowledged_only_if_the_options_say_so() -> None:
    check = {"id": "sc_1", "code": "malicious_instructions", "message": "Check it."}
    call = {"type": "computer_call", "pending_safety_checks": [check], "action": {"type": "wait"}}
    with pytest.raises(FormatError, match=r"requires a person to confirm 'malicious_instructions Check it\.'"):
        language_of("openai_computer_use").parse(json.dumps(call), RANGE)
    acknowledging = language_of("openai_computer_use", safety_checks="acknowledge")
    assert acknowledging.parse(json.dumps(call), RANGE).action.kind is ActionKind.WAIT


UNITS = ["a.a(1)", "(1)", ".a", "'a'", "''", "[", "(", "-", "+1", "a=", "1,", "[1],", "\\\n", "'''", "''' ", ";", "f'{"]
UNITS += ["pyautogui.click(1,2)\n", "import time\n", "# a\n", "a(b(", "```python\n", "\n```", "```", "## Thought:\n"]
UNITS += ["{", "{\n", '{"a":', '{"type": "text"}\n', "<tool_call>", "<tool_call>{", "</think>", "<think>", "\\", '"']
UNITS += ["+", "ctrl+", "9", " \n", "a "]
STARTS = {
    "qwen3_vl": ["", "<think>", '<tool_call>{"name": "computer_use", "arguments": {"action": "key", "keys": ["'],
    "opencua": ["", "```python\n", "```python\npyautogui.click(", "```python\npyautogui.write('"],
    "anthropic_computer_use": ["", '{"type": "tool_use", "name": "computer", "input": {"action": "key", "text": "'],
    "openai_computer_use": ["", '{"type": "computer_call", "action": {"type": "keypress", "keys": ["'],
}


def parse_duration_s(language: ActionLanguage, text: str, num_attempts: int = 1) -> float:
    """Return the shortest processor time in which a text was parsed."""
    durations = []
    for _ in range(num_attempts):
        started_s = time.process_time()
        try:
            language.parse(text, RANGE)
        except FormatError as error:
            assert len(str(error)) < 300 and "\n" not in str(error)
        durations.append(time.process_time() - started_s)
    return min(durations)


@pytest.mark.parametrize("name", FILES)
def test_the_time_to_parse_grows_linearly_with_the_length(name: str) -> None:
    language = language_of(name)
    for unit in UNITS:
        for text in (start + unit * (16_000 // len(unit)) for start in STARTS[name]):
            if parse_duration_s(language, text) > 0.03:
                part = text[: len(text) // 8]  # 8 times the length takes 8 times as long if linear, and 64 if quadratic
                assert parse_duration_s(language, text, 3) < 24 * parse_duration_s(language, part, 3), repr(text[:80])
