"""Four actors, sixteen, eight, four of them killed: the same as in tests/system, at the size of a fleet."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_kit import ElasticJob


@pytest.mark.timeout(1800)
def test_a_fleet_grows_shrinks_and_loses_half_of_itself(tmp_path: Path) -> None:
    job = ElasticJob(tmp_path, desktops_per_actor=16)
    try:
        job.scale(4)
        job.wait_until_all_work()
        job.scale(16)
        job.wait_until_all_work()
        job.scale(8)
        job.wait_until_all_work()
        job.kill(4)
        job.wait_until_all_work()
        job.scale(8)
        job.wait_until_all_work()
        job.check()
    finally:
        job.close()
