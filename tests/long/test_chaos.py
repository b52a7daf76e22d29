"""500 faults at random moments of running jobs: the same as in tests/system, as many as a night of a real job sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chaos_kit.disk import why_no_disk

PROGRAM = Path(__file__).with_name("chaos.py")
SEED = 1


@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(bool(why_no_disk()), reason=f"chaos needs a small disk: {why_no_disk()}")
def test_500_faults_and_nothing_is_wrong_afterwards(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--seed", str(SEED), "--faults", "500", "--runs", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
