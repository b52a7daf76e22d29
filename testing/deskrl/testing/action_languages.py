"""Contract suite of action languages: what `ActionLanguage` promises, checked on rendered and on defective responses.

Derive from `ActionLanguageSuite` in a test module, and run it with pytest:

    from deskrl.testing.action_languages import ActionLanguageSuite

    class TestJsonCalls(ActionLanguageSuite):
        selection = "json_calls:JsonCalls"

Hypothesis, if it is installed, adds random texts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, FormatError, PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.guest.keysyms import key_name
from deskrl.core.config import AgentConfig

SCREEN_SIZES = ((640, 480), (800, 600), (1280, 720), (1366, 768), (1920, 1080), (2560, 1080), (3840, 2160))
_INSTRUCTION = "Press {that} \"button\", then write C:\\new and '%s' <b>."
_THOUGHT = "The form is filled in, so I press Submit."
_LONG_CHARACTERS = 16_000
_MAX_MESSAGE_CHARACTERS = 300
_POINTERS = (
    ActionKind.CLICK,
    ActionKind.DOUBLE_CLICK,
    ActionKind.TRIPLE_CLICK,
    ActionKind.RIGHT_CLICK,
    ActionKind.MIDDLE_CLICK,
    ActionKind.MOVE,
)
_HARD_TEXTS = (
    "plain words",
    "it's",
    'say "yes"',
    "C:\\new\\table",
    "two\nlines and a\ttab\n",
    "')\n\"}\n```",
    "{}[]()<>|&;$`",
    "Zürich, 東京 😀",
    " spaces at both ends ",
)


class ActionLanguageSuite:
    """Tests of an action language; derive from it in a class whose name starts with Test."""

    selection: ClassVar[str]
    """Value of `agent.action_language`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Value of `agent.action_language_options`."""
    lacks: ClassVar[frozenset[ActionKind]] = frozenset()
    """Kinds of actions that the language cannot express."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> AgentConfig:
        """Provide the section `agent` that selects the language."""
        chosen = {"action_language": cls.selection, "action_language_options": dict(cls.options)}
        return AgentConfig.model_validate(chosen)

    @pytest.fixture(scope="class")
    @classmethod
    def language(cls, config: AgentConfig) -> ActionLanguage:
        """Provide the language."""
        return select_language(config)

    @pytest.fixture(scope="class", params=SCREEN_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
    @classmethod
    def screen(cls, request: pytest.FixtureRequest, config: AgentConfig) -> tuple[Conversation, tuple[int, int]]:
        """Provide a conversation about a screenshot of one size, and the size."""
        conversation = Agent(config).start_conversation(_INSTRUCTION)
        conversation.observe(Image.new("RGB", request.param))
        return conversation, request.param

    def test_the_prompt_contains_the_instruction_as_it_is(self, language: ActionLanguage, config: AgentConfig) -> None:
        prompt = language.initial_prompt(config, _INSTRUCTION)
        assert _INSTRUCTION in prompt.user, f"the instruction is not in the user message:\n{prompt.user}"
        assert prompt == language.initial_prompt(config, _INSTRUCTION), "a second call returned another prompt"

    def test_every_kind_of_action_is_parsed_as_it_was_rendered(
        self, screen: tuple[Conversation, tuple[int, int]]
    ) -> None:
        conversation, (width, height) = screen
        for action in self._actions(width // 2, height // 2):
            text = conversation.render(PolicyResponse(_THOUGHT, action))
            parsed = conversation.parse(text)
            assert parsed.thought == _THOUGHT, f"thought {parsed.thought!r} of {text!r}"
            assert _comparable(parsed.action) == _comparable(action), text

    def test_points_on_all_edges_are_kept_within_a_unit_of_the_coordinates(
        self, screen: tuple[Conversation, tuple[int, int]], language: ActionLanguage
    ) -> None:
        conversation, (width, height) = screen
        end_x, end_y = _range(language, (width, height))
        unit_x, unit_y = width / end_x, height / end_y
        for x in (0, 1, width // 3, width - 2, width - 1):
            for y in (0, 1, height // 3, height - 2, height - 1):
                for action in self._actions(x, y):
                    parsed = conversation.parse(conversation.render(PolicyResponse(_THOUGHT, action))).action
                    for found, asked, unit, side in (
                        (parsed.x, action.x, unit_x, width),
                        (parsed.y, action.y, unit_y, height),
                        (parsed.end_x, action.end_x, unit_x, width),
                        (parsed.end_y, action.end_y, unit_y, height),
                    ):
                        assert 0 <= found < side, f"{action} was read as {parsed}, outside the screen"
                        assert abs(found - asked) <= max(unit, unit / 2 + 1), f"{action} was read as {parsed}"

    def test_quoted_text_is_kept_and_never_taken_for_structure(self, language: ActionLanguage) -> None:
        rendered = [language.render(PolicyResponse(_THOUGHT, action)) for action in self._actions(3, 4)]
        for text in (*_HARD_TEXTS, *rendered, *(f"a\n{it}\nb" for it in rendered)):
            for kind in {ActionKind.TYPE, ActionKind.FINISHED} - self.lacks:
                response = PolicyResponse(_THOUGHT, Action(kind, text=text))
                written = language.render(response)
                assert language.parse(written, _range(language)) == response, written

    def test_random_quoted_text_is_kept(self, language: ActionLanguage) -> None:
        pytest.importorskip("hypothesis")
        from hypothesis import given, settings
        from hypothesis import strategies as st

        if ActionKind.TYPE in self.lacks:
            pytest.skip("the language has no TYPE")
        fragments = st.sampled_from(sorted(self._fragments(language)))
        printable = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]).filter(str.isprintable))

        @settings(deadline=None)
        @given(st.lists(fragments | printable | st.sampled_from("\n\t\\'\"")).map("".join))
        def check(text: str) -> None:
            if all(character.isprintable() or character in "\n\t" for character in text):
                response = PolicyResponse(_THOUGHT, Action(ActionKind.TYPE, text=text))
                assert language.parse(language.render(response), _range(language)) == response

        check()

    def test_a_defective_response_is_parsed_or_rejected_by_a_format_error(self, language: ActionLanguage) -> None:
        random = Random(0)
        for action in self._actions(3, 4):
            text = language.render(PolicyResponse(_THOUGHT, action))
            for end in range(len(text)):
                _parse_or_reject(language, text[:end])
                _parse_or_reject(language, text[end:])
                _parse_or_reject(language, text[:end] + random.choice("\\'\"(){}[]<>,:\n\0é9-") + text[end:])

    def test_any_text_is_parsed_or_rejected_by_a_format_error(self, language: ActionLanguage) -> None:
        pytest.importorskip("hypothesis")
        from hypothesis import given, settings
        from hypothesis import strategies as st

        fragments = st.sampled_from(sorted(self._fragments(language)))

        @settings(deadline=None)
        @given(st.text() | st.lists(fragments | st.text(max_size=3)).map("".join))
        def check(text: str) -> None:
            _parse_or_reject(language, text)

        check()

    @pytest.mark.parametrize("text", ["", "\n", "I am done.", "5", "null", "[]", "{}"])
    def test_text_without_an_action_is_rejected(self, language: ActionLanguage, text: str) -> None:
        with pytest.raises(FormatError):
            language.parse(text, _range(language))

    def test_two_actions_are_rejected(self, language: ActionLanguage) -> None:
        responses = [language.render(PolicyResponse(_THOUGHT, action)) for action in self._actions(3, 4)]
        for first, second in zip(responses, reversed(responses), strict=True):
            for text in (f"{first}\n{second}", f"{first}\n\n{second}"):
                with pytest.raises(FormatError):
                    print(language.parse(text, _range(language)), "is the reading of", text)

    def test_the_time_to_parse_grows_linearly_with_the_length(self, language: ActionLanguage) -> None:
        responses = [language.render(PolicyResponse(_THOUGHT, action)) for action in self._actions(3, 4)]
        starts = {"", max(responses, key=len)[:-3], *(it[: it.index("Hello")] for it in responses if "Hello" in it)}
        for fragment in sorted(self._fragments(language) | {" ", "\n", "\\", "'", '"', "9", "a"}):
            for start in sorted(starts):
                text = start + fragment * (_LONG_CHARACTERS // len(fragment))
                if _parse_duration_s(language, text) > 0.03:
                    part = text[: len(text) // 8]  # 8 times the length takes 8 times as long if linear
                    parts_s = 24 * min(_parse_duration_s(language, part) for _ in range(3))
                    assert min(_parse_duration_s(language, text) for _ in range(3)) < parts_s, repr(text[:80])

    def test_restored_markup_does_not_change_the_action(self, language: ActionLanguage) -> None:
        for action in self._actions(3, 4):
            text = language.render(PolicyResponse(_THOUGHT, action))
            restored = language.restore_markup(text)
            assert language.restore_markup(restored) == restored, "markup is restored twice"
            assert language.parse(restored, _range(language)) == language.parse(text, _range(language)), restored

    def _actions(self, x: int, y: int) -> Iterator[Action]:
        """Yield an action of each kind that the language has."""
        for kind in ActionKind:
            if kind in self.lacks:
                continue
            if kind in _POINTERS:
                yield Action(kind, x=x, y=y)
            elif kind is ActionKind.DRAG:
                yield Action(kind, x=x, y=y, end_x=y % 400, end_y=x % 400)
            elif kind is ActionKind.SCROLL:
                for scroll_x, scroll_y in ((0, 5), (0, -5), (5, 0), (-5, 0)):
                    yield Action(kind, x=x, y=y, scroll_x=scroll_x, scroll_y=scroll_y)
            elif kind is ActionKind.HOTKEY:
                yield from (Action(kind, keys=keys) for keys in (("ctrl", "shift", "s"), ("enter",), ("ctrl", "+")))
            elif kind in (ActionKind.TYPE, ActionKind.FINISHED):
                yield Action(kind, text="Hello")
            else:
                yield Action(kind, seconds=5.0 if kind is ActionKind.WAIT else 0.0)

    def _fragments(self, language: ActionLanguage) -> set[str]:
        """Return the pieces of which responses consist."""
        texts = [language.render(PolicyResponse(_THOUGHT, action)) for action in self._actions(3, 4)]
        return {piece for text in texts for piece in re.findall(r"\w+|\W+", text)}


def _comparable(action: Action) -> Action:
    """Return an action without its points and what a language may lose: duration of a pause, distance of a scroll."""
    right, down = ((value > 0) - (value < 0) for value in (action.scroll_x, action.scroll_y))
    return replace(action, x=0, y=0, end_x=0, end_y=0, seconds=0.0, scroll_x=right, scroll_y=down)


def _range(language: ActionLanguage, size: tuple[int, int] = (1280, 720)) -> tuple[int, int]:
    return language.coordinate_range(*size)


def _parse_or_reject(language: ActionLanguage, text: str) -> None:
    try:
        action = language.parse(text, _range(language)).action
    except FormatError as error:
        message = str(error)
        assert "\n" not in message and 0 < len(message) < _MAX_MESSAGE_CHARACTERS, f"message {message!r} for {text!r}"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} instead of FormatError for {text!r}") from error
    else:
        is_typed = action.kind is ActionKind.TYPE
        is_valid = all(it.isprintable() or it in "\n\t" for it in action.text) if is_typed else _is_utf8(action.text)
        assert is_valid, f"the text of {action} cannot be {'typed' if is_typed else 'stored'}, from {text!r}"
        assert all(key_name(it) == it for it in action.keys), f"{action} has unknown keys, from {text!r}"
        assert 0 <= action.seconds < 3600, f"{action} has no usable duration, from {text!r}"


def _is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: JSON can hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_duration_s(language: ActionLanguage, text: str) -> float:
    """Return the processor time in which a text is parsed."""
    started_s = time.process_time()
    _parse_or_reject(language, text)
    return time.process_time() - started_s
