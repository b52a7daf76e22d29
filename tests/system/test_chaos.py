"""A job under a few random faults finishes, and its record passes all checks; tests/long injects 500 faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_kit.disk import disk_unavailable_reason
from chaos_kit.fault_injector import run_job
from chaos_kit.job import build_model


@pytest.mark.skipif(bool(disk_unavailable_reason()), reason=f"no private disk: {disk_unavailable_reason()}")
def test_a_job_under_random_faults_finishes_without_violations(tmp_path: Path) -> None:
    outcome = run_job(tmp_path, "1-0", num_updates=5, max_faults=6, model=build_model(tmp_path / "model"))
    assert outcome.violations == [], outcome.report()
    assert outcome.faults
