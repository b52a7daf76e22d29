"""The action language of OpenCUA: reasoning in sections, and pyautogui code.

    ## Thought:
    The form is filled in, so I press Submit.

    ## Action:
    click

    ## Code:
    ```python
    pyautogui.click(x=412, y=230)
    ```

Format: github.com/xlang-ai/OpenCUA, and its agent in OSWorld. `pyautogui_code` reads the code.
"""

from __future__ import annotations

import re
from dataclasses import replace

from deskrl.actor.agent.action_language import ActionLanguage, FormatError, InitialPrompt, PolicyResponse
from deskrl.actor.agent.pyautogui_code import parse_code, render_code
from deskrl.core.config import AgentConfig
from deskrl.core.prompt_rendering import ImageSizing

_SIZING = ImageSizing(patch_size=14, merge_size=2, min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
"""Image scaling of the models that are based on Qwen2.5-VL."""
_SYSTEM = """\
You are a GUI agent. You get a task and a screenshot before each action, and write pyautogui code that performs the \
next action.

Write each response in this form:

## Thought:
{{Why the next action brings the task forward, in {language}}}

## Action:
{{The next action in one sentence, with its target and without coordinates}}

## Code:
```python
{{One action}}
```

Actions, with points in pixels of the screenshot:
- pyautogui.click(x, y), pyautogui.doubleClick(x, y), pyautogui.rightClick(x, y), pyautogui.middleClick(x, y), \
computer.triple_click(x, y)
- pyautogui.moveTo(x, y); to drag, write pyautogui.dragTo(x, y, button='left') after it
- pyautogui.scroll(clicks, x, y): a positive number scrolls up; pyautogui.hscroll(clicks, x, y): to the right
- pyautogui.write(message='text'), pyautogui.press('key', presses=1), pyautogui.hotkey('ctrl', 'c')
- pyautogui.keyDown('key') and pyautogui.keyUp('key') around an action of the mouse
- computer.wait(seconds)
- computer.terminate(status='success', answer='answer, if the task asks for one') or, if the task cannot be done, \
computer.terminate(status='failure')"""
_FENCE = re.compile(r"^[ \t]*+```(?:python|code|py)?(?=\s|$)", re.IGNORECASE | re.MULTILINE)
_END_OF_FENCE = re.compile(r"^[ \t]*+```|```[ \t]*+$", re.MULTILINE)
_BARE_CALL = re.compile(r"^[ \t]*+(?=(?:pyautogui|computer)\.\w++\()", re.MULTILINE)
_THOUGHT = re.compile(r"^#{1,4} {0,3}Thought\s{0,3}:?", re.MULTILINE | re.IGNORECASE)
_NEXT_SECTION = re.compile(r"^#{1,4} {0,3}(?:Action|Code)\s{0,3}:?[ \t]*+$", re.MULTILINE | re.IGNORECASE)


class OpenCUA(ActionLanguage):
    """OpenCUA 7B, 32B and 72B: coordinates in pixels of the screenshot as the model sees it."""

    title = "OpenCUA"
    has_relative_coordinates = False

    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the form of a response with the list of calls, and the task."""
        return InitialPrompt(_SYSTEM.format(language=config.language), f"# Task Instruction:\n{instruction}")

    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse the only code of a response, in a fenced block or in lines that begin with a call."""
        head, code = _split_response(text)
        return replace(parse_code(code), thought=_thought(head))

    def render(self, response: PolicyResponse) -> str:
        """Return the three sections of a response."""
        action = response.action
        code = f"```python\n{render_code(action)}\n```"
        return f"## Thought:\n{response.thought}\n\n## Action:\n{action.kind.replace('_', ' ')}\n\n## Code:\n{code}"

    def coordinate_range(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which the image processor scales a screenshot."""
        return _SIZING.scaled_size(width, height)


def _split_response(text: str) -> tuple[str, str]:
    """Return the text before the code of a response, and the code."""
    fence = _FENCE.search(text)
    if fence is None:
        call = _BARE_CALL.search(text)
        if call is None:
            raise FormatError("the response contains no code")
        return text[: call.start()], text[call.end() :]
    end = _END_OF_FENCE.search(text, fence.end())
    if end is None:
        return text[: fence.start()], text[fence.end() :]
    if _FENCE.search(text, end.end()):
        raise FormatError("the response contains more than one block of code")
    return text[: fence.start()], text[fence.end() : end.start()]


def _thought(head: str) -> str:
    """Return the section "Thought" of the text before the code; all of the text if it has no such section."""
    label = _THOUGHT.search(head)
    start = 0 if label is None else label.end()
    end = _NEXT_SECTION.search(head, start)
    return head[start : len(head) if end is None else end.start()].strip()
