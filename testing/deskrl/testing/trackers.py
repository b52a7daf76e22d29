"""Contract suite of experiment trackers (`tracker`).

Derive from `TrackerSuite` in a test module, and run it with pytest:

    from deskrl.testing.trackers import TrackerSuite

    class TestMine(TrackerSuite):
        selection = "my_trackers:Mine"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.config import RunConfig
from deskrl.learner.metrics.run_trackers import select_trackers
from deskrl.learner.metrics.trackers import Tracker


class TrackerSuite:
    """Checks of one tracker."""

    selection: str
    """Name in `tracker`."""

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        """Provide the tracker's table in `tracker_options`; override it to start a server, for example."""
        return {}

    @pytest.fixture
    def config(self, tmp_path: Path, options: Mapping[str, Any]) -> RunConfig:
        """Provide the configuration of a run whose directory exists."""
        config = RunConfig.model_validate(
            {
                "runs": tmp_path / "all runs",
                "tracker": [self.selection],
                "tracker_options": {self.selection: dict(options)},
            }
        )
        config.run_dir.mkdir(parents=True)
        return config

    def start(self, config: RunConfig) -> Tracker:
        """Start the tracker."""
        (selected,) = select_trackers(config)
        return selected.implementation(config, selected.options)

    def test_it_logs_whatever_a_run_has_and_only_to_the_run_directory(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        working = tmp_path / "working"
        working.mkdir()
        monkeypatch.chdir(working)
        tracker = self.start(config)
        tracker.log(0, {"eval/average_reward": 0.5})
        tracker.log(1, {"update/loss": float("nan"), "update/gradient_norm": float("inf")})
        tracker.log(1, {"update/per_task/größe: 10% \"a\" 'b' (c) [d]/n": 4.0})
        tracker.log(2, {f"replay/stored/task-{index}": float(index) for index in range(1500)})
        tracker.log(3, {"update/seconds/learn": -1e300})
        tracker.close()
        assert list(working.iterdir()) == [], "the tracker wrote to the working directory"

    def test_a_resumed_run_logs_updates_again(self, config: RunConfig) -> None:
        for steps in ((), (1, 2, 3), (3, 4)):
            tracker = self.start(config)
            for step in steps:
                tracker.log(step, {"update/loss": 1 / step})
            tracker.close()
