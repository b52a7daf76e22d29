"""Actors join and leave a running job, in good order or not, and nothing else notices. tests/long has more of them."""

from __future__ import annotations

from pathlib import Path

from elastic_kit import ElasticJob


def test_actors_join_leave_and_die_and_every_episode_is_played_once(tmp_path: Path) -> None:
    job = ElasticJob(tmp_path)
    try:
        job.scale(1)
        job.wait_until_all_work()
        job.scale(4)
        job.wait_until_all_work()
        job.kill(2)
        job.wait_for_finished(4)
        job.scale(1)
        job.check()
    finally:
        job.close()
