"""The task bundle `total-of-the-prices`: it can be solved, is not solved initially, and gives a partial reward."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.task import SolutionStep
from deskrl.actor.tasks.prove import prove
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import RunConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason="the packages of embedded desktops are missing")


def test_the_bundle_can_be_solved_and_prices_that_were_changed_give_half_the_reward() -> None:
    (task,) = load_tasks(Path(__file__).parent)
    cut = SolutionStep("Delete everything.", Action(ActionKind.HOTKEY, keys=("ctrl", "a")), None)
    spoilt = replace(task, id="spoilt", solution=(cut, *task.solution[1:]))
    proofs = asyncio.run(prove([task, spoilt], RunConfig(), num_repeats=0))
    assert [proof.initial_reward for proof in proofs] == [0.0, 0.0]
    assert [proof.solution_rewards for proof in proofs] == [[1.0], [0.5]]
