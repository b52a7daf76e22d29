"""`deskrl up` end to end on real desktops: each role and the supervisor may be killed, and the run resumes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from run_kit import Run, check_no_episode_is_lost_or_repeated

from deskrl.launch.supervisor import describe_leftovers


def test_a_run_survives_the_kill_of_any_role_without_losing_or_repeating_an_episode(tmp_path: Path) -> None:
    run = Run(tmp_path, num_updates=7)
    try:
        _kill_each_role_and_resume(run)
    finally:
        run.close()


def _kill_each_role_and_resume(run: Run) -> None:
    run.start()
    run.wait_for_update(1)
    kept: dict[str, tuple[float, int]] = {}
    victims = [("actor", "--index"), ("replay",), ("inference", "--index"), ("learner",)]
    for number, victim in enumerate(victims, start=1):
        run.wait_for_update(number)
        kept |= run.finished_episodes()
        run.role(*victim).kill()
        run.wait_for(lambda number=number: len(run.metrics("restart")) >= number)

    run.wait_for_update(5)
    run.signal(signal.SIGTERM)
    status, output = run.finish()
    assert status == 130, output[-2000:]
    assert "the same command resumes" in output
    assert describe_leftovers(run.folder) == []
    kept |= run.finished_episodes()

    run.start()
    run.wait_for_update(6)
    run.signal(signal.SIGKILL)
    run.finish()

    run.start()
    status, output = run.finish()
    assert "resuming" in output
    assert status == 1, "roles were restarted, so a criterion is not met"
    check_no_episode_is_lost_or_repeated(run, kept)
    verdicts = {row["criterion"]: row["ok"] for row in json.loads((run.folder.results / "acceptance.json").read_text())}
    assert verdicts["nothing is left behind"]
    assert verdicts["the checkpoint is valid"]
    assert not verdicts["the run finishes"]
    assert describe_leftovers(run.folder) == []
