"""A few faults at random moments of a running job, and what has to be true afterwards. tests/long has 500."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_kit.disk import why_no_disk
from chaos_kit.job import build_model
from chaos_kit.run import run_job


@pytest.mark.skipif(bool(why_no_disk()), reason=f"chaos needs a small disk: {why_no_disk()}")
def test_a_job_that_faults_are_done_to_ends_as_if_there_had_been_none(tmp_path: Path) -> None:
    outcome = run_job(tmp_path, "1-0", num_updates=5, max_faults=6, model=build_model(tmp_path / "model"))
    assert outcome.wrong == [], outcome.report()
    assert outcome.done
