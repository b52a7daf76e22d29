"""Up to sixteen actors join, leave and are killed while a job runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_kit import ElasticJob


@pytest.mark.timeout(1800)
def test_every_rollout_finishes_once_while_a_fleet_grows_shrinks_and_loses_half_of_its_actors(tmp_path: Path) -> None:
    job = ElasticJob(tmp_path, desktops_per_actor=16)
    try:
        job.scale(4)
        job.wait_until_all_are_busy()
        job.scale(16)
        job.wait_until_all_are_busy()
        job.scale(8)
        job.wait_until_all_are_busy()
        job.kill(4)
        job.wait_until_all_are_busy()
        job.scale(8)
        job.wait_until_all_are_busy()
        job.check()
    finally:
        job.close()
