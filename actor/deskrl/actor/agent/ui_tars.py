"""The action languages of UI-TARS 1.0, 1.5 and 2: prompts, notations of points, and coordinates.

    Thought: The form is filled in, so I press Submit.
    Action: click(start_box='(412,230)')

`action_parser` accepts the notations of all three for each of them.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Literal

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, InitialPrompt, PolicyResponse
from deskrl.actor.agent.ui_tars_parser import POINTER_NAMES, direction_name, escape, parse_response
from deskrl.core.config import AgentConfig
from deskrl.core.prompt_rendering import ImageSizing

_SIZING = ImageSizing(patch_size=14, merge_size=2, min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
"""Image scaling of the processors of all published models."""
_SYSTEM = "You are a helpful assistant."
_PROMPT = """\
You are a GUI agent. You are given a task, and what you have done so far with a screenshot before each action. \
Decide on the next action that brings the task forward.

## Output Format
```
{form}
```

## Action Space
{actions}

## Note
- Write {thought} in {language}.
- End {thought} with a short plan and one sentence that names the next action and its target.

## User Instruction
{instruction}
"""
_ACTIONS = """\
click({here})
left_double({here})
right_single({here})
drag({start}, {end})
hotkey(key='ctrl c') # Lower case, keys parted by spaces, three at most.
type(content='xxx') # Write \\', \\" and \\n for quotes and line breaks. End with \\n to submit.
scroll({here}, direction='down or up or right or left')
wait() # Waits 5 seconds, then shows a new screenshot.
{finished} # The task is done.{answer}
call_user() # The task cannot be done, or only the user can go on."""
_QUOTING = " Write \\', \\\" and \\n for quotes and line breaks."
_BARE_BOX = re.compile(r"(?<=_box=')\([^'<>]*\)(?=')")


class _UiTars(ActionLanguage):
    """What the three languages have in common."""

    _has_answer = True
    """Whether `finished` takes an answer."""
    _name_of_thought = "`Thought`"

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the prompt of a conversation about a task."""
        text = _PROMPT.format(
            form=f"{self._thought('...')}\nAction: ...",
            actions=_ACTIONS.format(
                here=self.point("", "x1", "y1"),
                start=self.point("start", "x1", "y1"),
                end=self.point("end", "x3", "y3"),
                finished="finished(content='xxx')" if self._has_answer else "finished()",
                answer=_QUOTING if self._has_answer else "",
            ),
            thought=self._name_of_thought,
            language=config.language,
            instruction=instruction,
        )
        return InitialPrompt(_SYSTEM, text)

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse a response; a `scroll` without a point turns the wheel at the centre."""
        return parse_response(text, centre=(coordinate_range[0] // 2, coordinate_range[1] // 2))

    def render(self, response: PolicyResponse) -> str:
        """Return the text that parses to `response`."""
        return f"{self._thought(response.thought)}\nAction: {self.render_action(response.action)}"

    def render_action(self, action: Action) -> str:
        """Return the call that parses to `action`, except for durations and distances, which the language lacks."""
        here = self.point("", action.x, action.y)
        if action.kind in POINTER_NAMES:
            return f"{POINTER_NAMES[action.kind]}({here})"
        match action.kind:
            case ActionKind.DRAG:
                start = self.point("start", action.x, action.y)
                return f"drag({start}, {self.point('end', action.end_x, action.end_y)})"
            case ActionKind.SCROLL:
                return f"scroll({here}, direction='{direction_name(action)}')"
            case ActionKind.HOTKEY:
                return f"hotkey(key='{' '.join(action.keys)}')"
            case ActionKind.TYPE:
                return f"type(content='{escape(action.text)}')"
            case ActionKind.WAIT:
                return "wait()"
            case ActionKind.FINISHED:
                return f"finished(content='{escape(action.text)}')" if action.text else "finished()"
            case ActionKind.INFEASIBLE:
                return "call_user()"
        raise ValueError(f"{self.title} has no {action.kind}")

    @abstractmethod
    def point(self, which: Literal["", "start", "end"], x: int | str, y: int | str) -> str:
        """Return a point as an argument of a call.

        Args:
            which: "start" or "end" for the points of a drag; empty for the only point of an action.
            x: horizontal coordinate, or a placeholder.
            y: vertical coordinate, or a placeholder.
        """

    def _thought(self, thought: str) -> str:
        return f"Thought: {thought}"


class UiTars10(_UiTars):
    """UI-TARS 1.0: coordinates in thousandths, points marked by special tokens."""

    title = "UI-TARS 1.0"
    architectures = ("qwen2_vl",)
    _has_answer = False

    def point(self, which: Literal["", "start", "end"], x: int | str, y: int | str) -> str:
        """Return a point between the special tokens that mark it."""
        return f"{which or 'start'}_box='<|box_start|>({x},{y})<|box_end|>'"

    def restore_markup(self, text: str) -> str:
        """Return decoded text with the special tokens that mark points."""
        return _BARE_BOX.sub(r"<|box_start|>\g<0><|box_end|>", text)


class UiTars15(_UiTars):
    """UI-TARS 1.5: coordinates in pixels of the screenshot as the model sees it."""

    title = "UI-TARS 1.5"
    architectures = ("qwen2_5_vl",)
    has_relative_coordinates = False

    def point(self, which: Literal["", "start", "end"], x: int | str, y: int | str) -> str:
        """Return a point in parentheses."""
        return f"{which or 'start'}_box='({x},{y})'"

    def coordinate_range(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which the image processor scales a screenshot."""
        return _SIZING.scaled_size(width, height)


class UiTars2(_UiTars):
    """UI-TARS 2: coordinates in thousandths, the thought as reasoning between tags."""

    title = "UI-TARS 2"
    architectures = ("qwen2_5_vl", "qwen2_vl")
    _name_of_thought = "what you think"

    def point(self, which: Literal["", "start", "end"], x: int | str, y: int | str) -> str:
        """Return a point between tags."""
        return f"{which + '_' if which else ''}point='<point>{x} {y}</point>'"

    def _thought(self, thought: str) -> str:
        return f"<think>{thought}</think>"
