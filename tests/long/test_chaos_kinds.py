"""Jobs under one kind of fault finish, and their records pass all checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_kit.disk import disk_unavailable_reason
from chaos_kit.fault_injector import run_job
from chaos_kit.job import build_model

from deskrl.actor.desktops.debian_packages import missing_packages

pytestmark = pytest.mark.skipif(bool(disk_unavailable_reason()), reason=f"no private disk: {disk_unavailable_reason()}")


@pytest.mark.skipif(bool(missing_packages(applications=False)), reason="packages of embedded desktops are missing")
@pytest.mark.parametrize("kind", ["answer_nonsense", "never_return"])
def test_a_job_whose_guest_servers_are_replaced_by_hostile_ones_finishes(tmp_path: Path, kind: str) -> None:
    model = build_model(tmp_path / "model")
    outcome = run_job(tmp_path, f"{kind}-0", 4, 8, model, "embedded", only=[kind])
    assert outcome.violations == [], outcome.report()
    assert outcome.faults


@pytest.mark.timeout(1800)
def test_a_job_whose_vllm_process_is_killed_finishes(tmp_path: Path) -> None:
    outcome = run_job(
        tmp_path, "kill_engine-0", 4, 2, build_model(tmp_path / "model"), with_vllm=True, only=["kill_engine"]
    )
    assert outcome.violations == [], outcome.report()
    assert outcome.faults
