"""Actors can join, leave and be killed while a job runs; tests/long does the same with more actors."""

from __future__ import annotations

from pathlib import Path

from elastic_kit import ElasticJob


def test_every_rollout_finishes_once_while_actors_join_leave_and_are_killed(tmp_path: Path) -> None:
    job = ElasticJob(tmp_path)
    try:
        job.scale(1)
        job.wait_until_all_are_busy()
        job.scale(4)
        job.wait_until_all_are_busy()
        job.kill(2)
        job.wait_for_finished(4)
        job.scale(1)
        job.check()
    finally:
        job.close()
