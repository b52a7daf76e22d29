"""UI-TARS's action grammar, of each family: what is understood, what is forgiven, what is refused and why."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.grammar import FormatError, Turn, parse_action, parse_turn, render_action, render_turn
from deskrl.core.families import FamilyName

CLICK = Action(ActionKind.CLICK, x=412, y=230)
DRAG = Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4)
FAMILIES = get_args(FamilyName)


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
def test_every_action_of_the_prompt_is_understood(call: str, action: Action) -> None:
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
def test_spelling_that_carries_no_meaning_is_forgiven(call: str) -> None:
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
def test_keys_are_named_in_several_ways(written: str, keys: tuple[str, ...]) -> None:
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
def test_typed_text_comes_out_as_meant(written: str, text: str) -> None:
    assert parse_turn(f"Thought: I type.\nAction: type(content='{written}')").action.text == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am done.", 'no "Action:"'),
        ("Action: click", "not of the form"),
        ("Action: click(start_box='(1,2)') and so on", "not of the form"),
        ("Action: click()", "click has no start_box"),
        ("Action: click(start_box='(1)')", "no point"),
        ("Action: click(start_box='(1,2,3)')", "no point"),
        ("Action: click(start_box='here')", "no point"),
        (f"Action: click(start_box='({'9' * 400},1)')", "no point"),
        ("Action: click('(1,2)')", "no argument of the form"),
        ("Action: drag(start_box='(1,2)')", "drag has no end_box"),
        ("Action: scroll(start_box='(1,2)', direction='sideways')", "none of up, down"),
        ("Action: hotkey(key='ctrl bogus')", "no key 'bogus'"),
        ("Action: hotkey()", "no key"),
        ("Action: type()", "type has no content"),
        ("Action: type(content='\x07')", "no key enters"),
        ("Action: frobnicate(start_box='(1,2)')", "no action 'frobnicate'"),
        ("Action: wait()\nAction: finished()", "more than one action"),
        ("Action: click(start_box='(1,2)')\n\nclick(start_box='(3,4)')", "more than one action"),
        ("Action: type(content='a')\n\nclick(start_box='(3,4)')", "more than one action"),
    ],
)
def test_what_is_no_single_action_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(FormatError) as refused:
        parse_turn(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("family", "click", "drag"),
    [
        (
            "ui_tars_1_0",
            "click(start_box='<|box_start|>(412,230)<|box_end|>')",
            "drag(start_box='<|box_start|>(1,2)<|box_end|>', end_box='<|box_start|>(3,4)<|box_end|>')",
        ),
        ("ui_tars_1_5", "click(start_box='(412,230)')", "drag(start_box='(1,2)', end_box='(3,4)')"),
        (
            "ui_tars_2",
            "click(point='<point>412 230</point>')",
            "drag(start_point='<point>1 2</point>', end_point='<point>3 4</point>')",
        ),
    ],
)
def test_each_family_writes_points_in_its_own_way(family: FamilyName, click: str, drag: str) -> None:
    assert (render_action(CLICK, family), render_action(DRAG, family)) == (click, drag)
    assert (parse_action(click), parse_action(drag)) == (CLICK, DRAG)


def test_the_thought_is_what_stands_before_the_action() -> None:
    assert parse_turn("Thought: Press save.\nAction: wait()").thought == "Press save."
    assert parse_turn("Thought: two\nlines Action: wait()").thought == "two\nlines"
    assert parse_turn("Press save.\nAction: wait()").thought == "Press save."
    assert parse_turn("Action: wait()").thought == ""
    assert parse_turn("<think>Action: none\nyet.</think>\nAction: wait()").thought == "Action: none\nyet."
    assert parse_turn("<think>Hm.</think>Thought: Press save.\nAction: wait()").thought == "Press save."
    assert parse_turn("Thought: I type.\nAction: type(content='<think>a</think>')").action.text == "<think>a</think>"


_texts = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]).filter(str.isprintable) | st.sampled_from("\n\t"))
_sides = st.integers(0, 4000)
_actions = st.one_of(
    st.builds(Action, st.sampled_from([ActionKind.CLICK, ActionKind.DOUBLE_CLICK, ActionKind.MOVE]), _sides, _sides),
    st.builds(Action, st.just(ActionKind.DRAG), _sides, _sides, _sides, _sides),
    st.builds(Action, st.just(ActionKind.SCROLL), _sides, _sides, scroll_y=st.sampled_from([-5, 5])),
    st.builds(Action, st.just(ActionKind.TYPE), text=_texts),
    st.builds(Action, st.just(ActionKind.HOTKEY), keys=st.sampled_from([("ctrl", "s"), ("enter",), ("ctrl", "+")])),
    st.builds(Action, st.just(ActionKind.WAIT), seconds=st.just(5.0)),
    st.builds(Action, st.just(ActionKind.FINISHED), text=_texts),
    st.just(Action(ActionKind.INFEASIBLE)),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(action=_actions)
def test_a_rendered_action_means_itself(family: FamilyName, action: Action) -> None:
    turn = Turn("Do it.", action)
    assert parse_turn(render_turn(turn, family)) == turn


@given(st.text() | st.from_regex(r"Action: (click|type|drag|hotkey|scroll)\((\w+='.*',? ?){0,3}\)"))
def test_whatever_a_policy_says_is_an_action_or_a_format_error(text: str) -> None:
    try:
        parse_turn(text)
    except FormatError as error:
        assert "\n" not in str(error)
