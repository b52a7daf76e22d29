"""Jobs under 500 random faults finish, and their records pass all checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chaos_kit.disk import disk_unavailable_reason

PROGRAM = Path(__file__).with_name("chaos.py")
SEED = 1


@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(bool(disk_unavailable_reason()), reason=f"no private disk: {disk_unavailable_reason()}")
def test_jobs_under_500_random_faults_finish_without_violations(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--seed", str(SEED), "--faults", "500", "--runs", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
