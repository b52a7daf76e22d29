"""Partial rewards, between 0 and 1, in the validation of tasks: proofs and audits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from rewards_kit import TASK, DesktopDouble

from deskrl.actor.tasks import evaluators
from deskrl.actor.tasks.audit import Attempt, attempt_cheats
from deskrl.actor.tasks.prove import Proof
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import RunConfig


@pytest.mark.parametrize(
    ("initial", "solution", "holds"),
    [(0.0, 1.0, True), (0.05, 1.0, True), (0.4, 1.0, False), (0.0, 0.97, False), (None, 1.0, False)],
)
def test_a_proof_needs_full_rewards_of_the_solution_and_an_initial_state_that_is_no_success(
    initial: float | None, solution: float, holds: bool
) -> None:
    proof = Proof("task", 0.1, initial_reward=initial, solution_rewards=[1.0, solution])
    assert proof.holds == holds


class PartialDesktop(DesktopDouble):
    """Desktop whose task has a partial reward initially, and more after a cheat."""

    async def reset(self) -> None:
        self.calls.clear()

    async def windows(self) -> list[dict[str, Any]]:
        self.calls.append("windows")
        return []


def attempt(cheat: str, before: float, after: float, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Run a cheat that looks at windows; the evaluator gives `after` if it was run."""
    desktop = PartialDesktop()
    monkeypatch.setitem(
        evaluators.METRICS, "exact_match", lambda *arguments: after if "windows" in desktop.calls else before
    )
    task = parse_task(json.dumps(TASK).encode(), "task")
    return asyncio.run(attempt_cheats(desktop, task, (cheat,), RunConfig()))


def test_a_cheat_is_rewarded_only_beyond_the_reward_of_doing_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt("terminal-keys", 0.05, 0.05, monkeypatch).verdict == "held"
    assert attempt("terminal-keys", 0.05, 0.08, monkeypatch).verdict == "rewarded"
    assert attempt("terminal-keys", 0.0, 0.0, monkeypatch).verdict == "held"


def test_doing_nothing_is_rewarded_if_the_initial_state_is_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt("nothing", 0.05, 0.05, monkeypatch).verdict == "held"
    assert attempt("nothing", 0.4, 0.4, monkeypatch).verdict == "rewarded"
