"""What a policy is told before its first screenshot, by family. Knows words; the forms of actions are `grammar`'s."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from deskrl.actor.agent.grammar import write_point
from deskrl.core.config import AgentConfig
from deskrl.core.errors import UserError
from deskrl.core.families import FamilyName


class Opening(NamedTuple):
    """The texts that a conversation begins with."""

    system: str
    user: str


_FULL_SYSTEM = "You are a helpful assistant."
_FULL_PROMPT = """\
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
_INSTRUCTION = "{instruction}"
_BRIEF_SYSTEM = "Use the computer."


def opening(config: AgentConfig, instruction: str) -> Opening:
    """What a task's conversation begins with."""
    if config.prompt == "brief":
        return Opening(_BRIEF_SYSTEM, instruction)
    if config.prompt_file is not None:
        words = read_template(config.prompt_file).replace("{language}", config.language)
        return Opening(_FULL_SYSTEM, words.replace(_INSTRUCTION, instruction))
    family = config.family
    thinks = family == "ui_tars_2"
    words = _FULL_PROMPT.format(
        form="<think>...</think>\nAction: ..." if thinks else "Thought: ...\nAction: ...",
        actions=_action_space(family),
        thought="what you think" if thinks else "`Thought`",
        language=config.language,
        instruction=instruction,
    )
    return Opening(_FULL_SYSTEM, words)


@cache
def read_template(path: Path) -> str:
    """A prompt of somebody's own.

    Raises:
        UserError: it cannot be read, or has no place for the instruction.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})", "name a text file in agent.prompt_file") from error
    if _INSTRUCTION not in text:
        raise UserError(f"{path} has no {_INSTRUCTION}, so no task would be told", "write it where the task belongs")
    return text


def _action_space(family: FamilyName) -> str:
    """Every action, one a line; only UI-TARS 1.0 ends without an answer."""
    answers = family != "ui_tars_1_0"
    return _ACTIONS.format(
        here=write_point(family, "", "x1", "y1"),
        start=write_point(family, "start", "x1", "y1"),
        end=write_point(family, "end", "x3", "y3"),
        finished="finished(content='xxx')" if answers else "finished()",
        answer=_QUOTING if answers else "",
    )
