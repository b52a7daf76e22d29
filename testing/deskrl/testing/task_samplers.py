"""Contract suite of task samplers (`tasks.sampler`).

Derive from `TaskSamplerSuite` in a test module, and run it with pytest:

    from deskrl.testing.task_samplers import TaskSamplerSuite

    class TestMine(TaskSamplerSuite):
        selection = "my_samplers:mine"
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from deskrl.core.registry import Extension
from deskrl.learner.task_samplers import TASK_SAMPLERS, SamplerInputs, TaskSampler, sample_task

TASK_IDS = ("web", "image", "text", "sheet", "files")
RATES: Mapping[str, float] = {"web": 1.0, "image": 0.5, "sheet": 0.0}
_PROGRAM = """
import json, sys
from deskrl.testing.task_samplers import TASK_SAMPLERS, plan
selection, options = json.loads(sys.argv[1])
print(json.dumps(plan(TASK_SAMPLERS.select(selection, options), range(40))))
"""


class TaskSamplerSuite:
    """Checks of one task sampler."""

    selection: str
    """Value of `tasks.sampler`."""
    options: Mapping[str, Any] = {}
    """Value of `tasks.sampler_options`."""

    @pytest.fixture
    def sampler(self) -> Extension[TaskSampler]:
        """Provide the selected task sampler."""
        return TASK_SAMPLERS.select(self.selection, self.options)

    @pytest.mark.parametrize("rates", [{}, RATES, dict.fromkeys(TASK_IDS, 0.0), dict.fromkeys(TASK_IDS, 1.0)])
    @pytest.mark.parametrize("num_tasks", [1, 2, 5])
    def test_each_group_plays_a_task_of_the_list(
        self, sampler: Extension[TaskSampler], num_tasks: int, rates: Mapping[str, float]
    ) -> None:
        for ordinal in (*range(20), 10_000):
            known = {task_id: rate for task_id, rate in rates.items() if task_id in TASK_IDS[:num_tasks]}
            sample_task(sampler, SamplerInputs(ordinal, 7, TASK_IDS[:num_tasks], known))  # raises UserError

    def test_a_group_plays_the_same_task_whatever_was_asked_before(self, sampler: Extension[TaskSampler]) -> None:
        """A resumed run plans the groups that follow its checkpoint, without those before."""
        assert plan(sampler, range(20, 40)) == plan(sampler, range(40))[20:], "the sampler remembers earlier calls"
        backwards = plan(sampler, range(39, -1, -1))
        assert backwards[::-1] == plan(sampler, range(40)), "the sampler remembers earlier calls"

    def test_the_success_rates_are_not_changed(self, sampler: Extension[TaskSampler]) -> None:
        rates = dict(RATES)
        sample_task(sampler, SamplerInputs(3, 7, TASK_IDS, rates))
        assert rates == RATES, "the sampler changed the success rates"

    def test_every_task_is_played_before_its_success_rate_is_known(self, sampler: Extension[TaskSampler]) -> None:
        played = {sample_task(sampler, SamplerInputs(ordinal, 7, TASK_IDS, {})) for ordinal in range(500)}
        assert played == set(TASK_IDS), f"never played in 500 groups: {sorted(set(TASK_IDS) - played)}"

    def test_the_plan_is_the_same_in_every_process(self, sampler: Extension[TaskSampler]) -> None:
        """The order of a set and `hash` of a string differ between processes."""
        expected = plan(sampler, range(40))
        for hash_seed in ("1", "2"):
            ended = subprocess.run(
                [sys.executable, "-c", _PROGRAM, json.dumps([self.selection, dict(self.options)])],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed},
            )
            assert ended.returncode == 0, ended.stderr
            assert json.loads(ended.stdout) == expected, "another process chose other tasks"


def plan(sampler: Extension[TaskSampler], ordinals: range) -> list[str]:
    """Return the tasks that groups play, with fixed success rates."""
    return [sample_task(sampler, SamplerInputs(ordinal, 7, TASK_IDS, RATES)) for ordinal in ordinals]
