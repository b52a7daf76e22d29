"""The drawing board keeps the contract of desktop providers, and its task can be solved on it."""

from __future__ import annotations

import asyncio

from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.materialize_tasks import load
from deskrl.actor.tasks.prove import prove
from deskrl.core.config import RunConfig
from deskrl.testing.desktops import DesktopSuite

PROVIDER = "drawing_board:BoardProvider"


class TestBoard(DesktopSuite):
    provider = PROVIDER


def test_the_task_is_rewarded_only_for_its_solution() -> None:
    config = RunConfig.model_validate({"desktop": {"provider": PROVIDER, "num_envs": 1}})
    tasks, left_out = load(config)
    (proof,) = asyncio.run(prove(tasks, config, num_repeats=2))
    assert (proof.problems, left_out) == ([], {})
    assert (proof.initial_reward, proof.solution_rewards) == (0.0, [1.0, 1.0, 1.0])


def test_the_colours_are_options_of_the_provider() -> None:
    config = RunConfig.model_validate({"desktop": {"provider": PROVIDER, "provider_options": {"colours": ["green"]}}})
    assert select_provider(config.desktop).options.colours == ("green",)
