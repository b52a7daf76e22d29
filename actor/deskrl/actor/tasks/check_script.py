"""Reward of a task bundle's check.sh: exit status and standard output as a value in [0, 1].

    exit status   reward = "exit_status"   reward = "number"
    0             1.0                      last line of the standard output that is not blank, a number in [0, 1]
    1 to 125      0.0                      0.0
    126, 127, more or a signal             no reward (UnreadableStateError)

No reward is also what a time-out leads to, and any other last line: text, NaN, 2. Whether that is a fault or the
policy's failure is decided by `end_causes`, as for every state that cannot be read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

_LARGEST_VERDICT = 125
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SHOWN_CHARACTERS = 200

RewardSource = Literal["exit_status", "number"]


@dataclass(frozen=True)
class ScriptResult:
    """Result of a check.sh that ran to its end."""

    status: int
    """Exit status; negative, or above 128, for a signal."""
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """Last line of the standard output that is not blank; empty if there is none."""
        return next((line.strip() for line in reversed(self.stdout.splitlines()) if line.strip()), "")

    def summary(self) -> dict[str, int | str]:
        """Return the result as evidence of limited size."""
        texts = {"last_line": self.last_line, "stderr": self.stderr.strip()[-_SHOWN_CHARACTERS:]}
        return {"status": self.status} | {name: text[:_SHOWN_CHARACTERS] for name, text in texts.items() if text}


class NoRewardError(ValueError):
    """The result of a check.sh is not a reward."""


def script_reward(result: ScriptResult, source: RewardSource) -> float:
    """Return the reward that a check.sh gives, by the table of this module; raises NoRewardError."""
    if not 0 <= result.status <= _LARGEST_VERDICT:
        problem = result.stderr.strip().splitlines()[-1:] or [""]
        raise NoRewardError(f"exit status {result.status} {problem[0][:_SHOWN_CHARACTERS]}".rstrip())
    if result.status != 0:
        return 0.0
    return 1.0 if source == "exit_status" else _number(result.last_line)


def _number(line: str) -> float:
    if not line:
        raise NoRewardError("printed nothing, where a number in [0, 1] is required")
    value = float(line) if _NUMBER.fullmatch(line) else math.nan
    if not 0 <= value <= 1:
        raise NoRewardError(f"the last line {line[:_SHOWN_CHARACTERS]!r} is not a number in [0, 1]")
    return abs(value)  # a zero without a sign
