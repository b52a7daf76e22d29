"""Task data model: instruction, setup steps, evaluator and scripted solution of one task."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from deskrl.actor.actions import Action
from deskrl.core.ids import derive_seed


@dataclass(frozen=True)
class TypedItem:
    """A setup step or a getter: its type and its parameters."""

    type: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One metric of an evaluator with the getters of its arguments."""

    func: str
    """Name of the metric."""
    result: TypedItem | None
    """Getter of the actual value; None only for the metrics `infeasible` and `reward_file`."""
    expected: TypedItem | None
    """Getter of the expected value; None if the metric takes none."""
    options: dict[str, Any]
    """Keyword arguments of the metric."""

    @property
    def items(self) -> tuple[TypedItem, ...]:
        """Getters of the result and, if given, of the expected value."""
        return tuple(item for item in (self.result, self.expected) if item is not None)


@dataclass(frozen=True)
class Evaluator:
    """Rule by which the end state of an episode is evaluated."""

    checks: tuple[Check, ...]
    """Metrics to compute."""
    conj: str
    """How the metrics are combined: "and" or "or"."""
    postconfig: tuple[TypedItem, ...]
    """Steps that run on the desktop before the metrics are computed."""

    @property
    def is_infeasible(self) -> bool:
        """Whether the correct answer is that the task is infeasible."""
        return any(check.func == "infeasible" for check in self.checks)

    @property
    def is_reward_file(self) -> bool:
        """Whether reward.py of the task's bundle judges the end state."""
        return any(check.func == "reward_file" for check in self.checks)


@dataclass(frozen=True)
class SolutionStep:
    """One step of a scripted solution."""

    thought: str
    action: Action
    box: tuple[int, int, int, int] | None
    """Target of a pointer action in pixels (left, top, right, bottom); None if the action gives the exact point."""


@dataclass(frozen=True)
class Task:
    """One validated task."""

    id: str
    domain: str
    instruction: str
    related_apps: tuple[str, ...]
    config: tuple[TypedItem, ...]
    """Setup steps."""
    evaluator: Evaluator
    solution: tuple[SolutionStep, ...]
    """Scripted solution; empty if the task has none."""
    evaluate_within_s: float
    """Time in seconds during which a negative evaluation is repeated before it is final."""
    proxy: bool
    """Whether OSWorld reaches the task's web pages through a proxy, because they are on the internet."""
    data: bytes
    """Task file as it was read. Rollouts carry these bytes."""

    def solve(self, seed: int) -> list[tuple[str, Action]]:
        """Return the scripted solution as (thought, action), each point sampled uniformly from its box by `seed`."""
        generator = random.Random(derive_seed("solution", self.id, seed))
        return [(step.thought, _sample_point(step, generator)) for step in self.solution]

    def demonstrate(self) -> list[tuple[str, Action]]:
        """Return the scripted solution as (thought, action), each point at the centre of its box, for imitation."""
        return [(step.thought, _centre_point(step)) for step in self.solution]


def _sample_point(step: SolutionStep, generator: random.Random) -> Action:
    if step.box is None:
        return step.action
    left, top, right, bottom = step.box
    return replace(step.action, x=generator.randint(left, right), y=generator.randint(top, bottom))


def _centre_point(step: SolutionStep) -> Action:
    if step.box is None:
        return step.action
    left, top, right, bottom = step.box
    return replace(step.action, x=(left + right) // 2, y=(top + bottom) // 2)
