"""Replay and actors deliver complete batches within the staleness limit from a fleet of simulated desktops."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_measurement_kit import MAX_STALENESS, FleetSpec, measure_updates

NUM_DESKTOPS = 16


@pytest.mark.parametrize(("schedule", "staleness_limit"), [("asynchronous", MAX_STALENESS), ("lock_step", 0)])
def test_every_episode_is_trained_on_within_the_staleness_limit(
    schedule: str, staleness_limit: int, tmp_path: Path
) -> None:
    fleet = FleetSpec(NUM_DESKTOPS, 200.0, schedule, width=168, height=112, prompt_tokens=50)
    measured = measure_updates(fleet, tmp_path, num_skipped=1, num_measured=2)
    assert [update.num_episodes for update in measured.updates] == [NUM_DESKTOPS] * 3
    assert measured.dropped_share == 0
    assert max(update.max_staleness for update in measured.updates) <= staleness_limit
    waits = measured.samples.by_state["waiting_for_others"] > 0
    assert waits == (schedule == "lock_step")
