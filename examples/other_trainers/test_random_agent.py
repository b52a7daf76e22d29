"""The random agent plays episodes to their ends and reports their rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="the extra env is not installed")

from random_agent import play

DESKTOP = {"provider": "simulated", "simulated": {"time_scale": 1e-9, "hang_rate": 0.0}, "width": 560, "height": 280}


def test_random_actions_end_episodes_with_rewards(tmp_path: Path) -> None:
    records = play({"runs": str(tmp_path), "desktop": DESKTOP, "tasks": {"max_steps": 5}}, num_steps=40)
    assert len(records) >= 8
    assert {record["termination"] for record in records} <= {"finished", "infeasible", "step_limit"}
    assert all(record["reward"] == 0.0 and record["num_steps"] <= 5 for record in records)
