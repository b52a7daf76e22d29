"""A fleet of simulated desktops, real actors and real replay: batch after batch comes in under both schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_rig import MAX_STALENESS, Fleet, measure

NUM_DESKTOPS = 16


@pytest.mark.parametrize(("schedule", "staleness_limit"), [("free", MAX_STALENESS), ("lock_step", 0)])
def test_every_episode_is_learnt_from_in_time(schedule: str, staleness_limit: int, tmp_path: Path) -> None:
    fleet = Fleet(NUM_DESKTOPS, 200.0, schedule, width=168, height=112, prompt_tokens=50)
    measured = measure(fleet, tmp_path, skipped=1, counted=2)
    assert [update.num_episodes for update in measured.updates] == [NUM_DESKTOPS] * 3
    assert measured.dropped_share == 0
    assert max(update.max_staleness for update in measured.updates) <= staleness_limit
    waits = measured.samples.by_state["waiting_for_others"] > 0
    assert waits == (schedule == "lock_step")
