"""UI-TARS's action languages: accepted notations, ignored variations, and reasons of rejection."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError
from deskrl.actor.agent.ui_tars import UiTars2, UiTars10, UiTars15
from deskrl.actor.agent.ui_tars_parser import parse_action, parse_response
from deskrl.actor.guest.keysyms import keysym_of_name

CLICK = Action(ActionKind.CLICK, x=412, y=230)
DRAG = Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4)
OUTPUTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "action_outputs.json").read_text(encoding="utf-8"))
"""Outputs of models as public parsers, tests and reports show them, each with its source and its reading or error."""
CENTRE = (640, 360)


@pytest.mark.parametrize(
    ("call", "action"),
    [
        ("click(start_box='(412,230)')", CLICK),
        ("left_double(start_box='(412,230)')", Action(ActionKind.DOUBLE_CLICK, x=412, y=230)),
        ("right_single(start_box='(412,230)')", Action(ActionKind.RIGHT_CLICK, x=412, y=230)),
        ("drag(start_box='(1,2)', end_box='(3,4)')", Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4)),
        ("scroll(start_box='(1,2)', direction='down')", Action(ActionKind.SCROLL, x=1, y=2, scroll_y=5)),
        ("scroll(start_box='(1,2)', direction='left')", Action(ActionKind.SCROLL, x=1, y=2, scroll_x=-5)),
        ("hotkey(key='ctrl shift s')", Action(ActionKind.HOTKEY, keys=("ctrl", "shift", "s"))),
        ("type(content='hello')", Action(ActionKind.TYPE, text="hello")),
        ("wait()", Action(ActionKind.WAIT, seconds=5.0)),
        ("finished()", Action(ActionKind.FINISHED)),
        ("finished(content='42')", Action(ActionKind.FINISHED, text="42")),
        ("call_user()", Action(ActionKind.INFEASIBLE)),
        ("error_env()", Action(ActionKind.INFEASIBLE)),
    ],
)
def test_every_action_of_the_prompt_is_parsed(call: str, action: Action) -> None:
    assert parse_action(call) == action


@pytest.mark.parametrize(
    "call",
    [
        "click(start_box='( 412 , 230 )')",
        'click( start_box = "(412, 230)" )',
        "click(start_box='<|box_start|>(412,230)<|box_end|>')",
        "click(point='<point>412 230</point>')",
        "click(start_point='412,230')",
        "click(point='<point>412, 230</point>')",
        "click(start_box='<point>412 230</point>')",
        "click(start_box='[402, 220, 422, 240]')",
        "click(start_box=(412,230))",
        "click(start_box='(411.6,230.2)')",
        "left_single(start_box='(412,230)')",
    ],
)
def test_variations_of_notation_without_meaning_are_accepted(call: str) -> None:
    assert parse_action(call) == CLICK


@pytest.mark.parametrize(
    ("written", "keys"),
    [
        ("ctrl+c", ("ctrl", "c")),
        ("Ctrl C", ("ctrl", "c")),
        ("ctrl +", ("ctrl", "+")),
        ("+", ("+",)),
        ("arrowleft", ("left",)),
        ("Return", ("enter",)),
        ("page_down", ("pagedown",)),
        ("f5", ("f5",)),
    ],
)
def test_keys_may_be_named_in_several_ways(written: str, keys: tuple[str, ...]) -> None:
    assert parse_action(f"hotkey(key='{written}')").keys == keys


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"plan\n", "plan\n"),
        (r"it\'s", "it's"),
        ("it's", "it's"),
        (r"say \"yes\"", 'say "yes"'),
        (r"C:\\new", r"C:\new"),
        (r"50 \% of it", r"50 \% of it"),
        ("Action: none", "Action: none"),
        ("a, content of it", "a, content of it"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("Zürich, 東京", "Zürich, 東京"),
    ],
)
def test_typed_text_is_unescaped(written: str, text: str) -> None:
    assert parse_response(f"Thought: I type.\nAction: type(content='{written}')").action.text == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am done.", 'no "Action:"'),
        ("Action: click", "is not of the form"),
        ("Action: click()", "click has no start_box"),
        ("Action: click(start_box='(1)')", "is not a point"),
        ("Action: click(start_box='(1,2,3)')", "is not a point"),
        ("Action: click(start_box='here')", "is not a point"),
        (f"Action: click(start_box='({'9' * 400},1)')", "is not a point"),
        ("Action: click(start_box=)", "is not an argument of the form"),
        ("Action: scroll(direction='down')", "scroll has no start_box"),
        ("Action: drag(start_box='(1,2)')", "drag has no end_box"),
        ("Action: scroll(start_box='(1,2)', direction='sideways')", "is not one of up, down"),
        ("Action: hotkey(key='ctrl bogus')", "unknown key 'bogus'"),
        ("Action: hotkey()", "hotkey has no key"),
        ("Action: type()", "type has no content"),
        ("Action: type(content='\x07')", "cannot be typed"),
        ("Action: frobnicate(start_box='(1,2)')", "unknown action 'frobnicate'"),
        ("Action: wait()\nAction: finished()", "more than one action"),
        ("Action: click(start_box='(1,2)')\n\nclick(start_box='(3,4)')", "more than one action"),
        ("Action: type(content='a')\n\nclick(start_box='(3,4)')", "more than one action"),
    ],
)
def test_text_without_exactly_one_valid_action_is_rejected_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(FormatError) as error:
        parse_response(text)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("language", "click", "drag"),
    [
        (
            UiTars10(),
            "click(start_box='<|box_start|>(412,230)<|box_end|>')",
            "drag(start_box='<|box_start|>(1,2)<|box_end|>', end_box='<|box_start|>(3,4)<|box_end|>')",
        ),
        (UiTars15(), "click(start_box='(412,230)')", "drag(start_box='(1,2)', end_box='(3,4)')"),
        (
            UiTars2(),
            "click(point='<point>412 230</point>')",
            "drag(start_point='<point>1 2</point>', end_point='<point>3 4</point>')",
        ),
    ],
)
def test_each_language_writes_points_in_its_own_way(language: Any, click: str, drag: str) -> None:
    assert (language.render_action(CLICK), language.render_action(DRAG)) == (click, drag)
    assert (parse_action(click), parse_action(drag)) == (CLICK, DRAG)


def test_the_thought_is_the_text_before_the_action() -> None:
    assert parse_response("Thought: Press save.\nAction: wait()").thought == "Press save."
    assert parse_response("Thought: two\nlines Action: wait()").thought == "two\nlines"
    assert parse_response("Press save.\nAction: wait()").thought == "Press save."
    assert parse_response("Action: wait()").thought == ""
    assert parse_response("<think>Action: none\nyet.</think>\nAction: wait()").thought == "Action: none\nyet."
    assert parse_response("<think>Hm.</think>Thought: Press save.\nAction: wait()").thought == "Press save."
    assert (
        parse_response("Thought: I type.\nAction: type(content='<think>a</think>')").action.text == "<think>a</think>"
    )


def test_the_table_of_outputs_covers_every_kind_of_action_and_names_its_sources() -> None:
    assert len(OUTPUTS) >= 300
    assert len({output["output"] for output in OUTPUTS}) == len(OUTPUTS)
    kinds = {output["action"]["kind"] for output in OUTPUTS if "action" in output}
    assert kinds == set(ActionKind) - {ActionKind.TRIPLE_CLICK, ActionKind.MIDDLE_CLICK}
    assert all(output["source"] for output in OUTPUTS)
    assert all(("action" in output) != bool(output.get("error") and output.get("why")) for output in OUTPUTS)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: repr(output["output"])[-60:])
def test_outputs_of_models_are_read_as_the_table_states(output: dict[str, Any]) -> None:
    if "action" in output:
        assert parse_response(output["output"], CENTRE).action.to_record() == output["action"]
    else:
        with pytest.raises(FormatError) as error:
            parse_response(output["output"], CENTRE)
        assert output["error"] in str(error.value)


def test_every_key_of_the_table_of_outputs_can_be_pressed() -> None:
    pytest.importorskip("Xlib", reason="python-xlib is not installed: pip install deskrl[actor]")
    keys = {key for output in OUTPUTS for key in output.get("action", {}).get("keys", ())}
    assert len(keys) > 60
    assert {key for key in keys if keysym_of_name(key) is None} == set()


REPEATED = ["(", ")", "'", "')", "'),", "\\", "\\'", " ", "\n", "Action: ", "Action:\n", "\nAction: click(", "click("]
REPEATED += ["\nAction: type(content='a\n", "click(start_box='", "a='b',", "1 ", "1,", "((1,", "[", "' , ", "'\t\n "]
REPEATED += ["<point>1 2</point>", "<", "<think>", "</think>\n", "</think>", "Thought: ", "'''", "ctrl ", "ctrl-", "9"]
REPEATED += ["start_box", ", end_box", "\r", "' end_box", "a", "a.", "') then ", "',a", "'a=", "a =", "`", "`a\n", "“"]
STARTS = ["", "Action: click(", "Action: click(start_box='", "Action: type(content='", "Action: type(content="]
STARTS += ["Action: hotkey(key='", "Action: wait() ", "<think>"]


def parse_duration_s(text: str, num_attempts: int = 1) -> float:
    """Return the shortest time in which a text was parsed, in processor time."""
    durations = []
    for _ in range(num_attempts):
        started_s = time.process_time()
        try:
            parse_response(text, CENTRE)
        except FormatError as error:
            assert len(str(error)) < 300
        durations.append(time.process_time() - started_s)
    return min(durations)


@pytest.mark.parametrize("unit", REPEATED, ids=repr)
def test_the_time_to_parse_grows_linearly_with_the_length(unit: str) -> None:
    for text in (start + unit * (32_000 // len(unit)) + end for start in STARTS for end in ("", "')")):
        if parse_duration_s(text) > 0.03:
            part = text[: len(text) // 8]  # 8 times the length takes 8 times as long if linear, and 64 if quadratic
            assert parse_duration_s(text, 3) < 24 * parse_duration_s(part, 3), f"{text[:40]!r} …"


_texts = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]).filter(str.isprintable) | st.sampled_from("\n\t"))
_FRAGMENTS = [
    "'",
    '"',
    "\\",
    "\n",
    ")",
    "(",
    "')",
    '")',
    "',",
    "\\'",
    "Action: wait()",
    "drag(",
    "Thought:",
    "<think>",
    "```",
]
_FRAGMENTS += [
    "\nAction: click(start_box='(1,2)')",
    "\nclick(start_box='(1,2)')\n",
    "</think>\n",
    "</think>",
    "# ",
    "’",
    "“",
]
_FRAGMENTS += [
    ", end_box='",
    "Action：",
    "start_box='",
    "\\n",
    "\\r\\n",
    "<|box_start|>",
    "  ",
    "\t",
    "finished()",
    "=",
    "，",
]
_FRAGMENTS += ["）", "a", "')\n", "'''"]
_fragments = st.sampled_from(_FRAGMENTS)
_hard_texts = _texts | st.lists(_fragments | _texts).map("".join)


@given(
    text=_hard_texts, after=st.sampled_from(["", "\n", ".", " # types it", "\n```", "<|im_end|>", "\nThis types it."])
)
def test_text_after_an_action_does_not_change_it(text: str, after: str) -> None:
    action = Action(ActionKind.TYPE, text=text)
    assert parse_response(f"Action: {UiTars15().render_action(action)}{after}").action == action
