"""What a person is told by the command line, whatever else writes to the same terminal."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


def test_a_refusal_reaches_standard_error_in_one_write(tmp_path: Path) -> None:
    """Ranks that refuse together write unbuffered to one pipe: a line written in pieces would mix with another's."""
    absent = tmp_path / "absent.toml"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps the borders between writes
    with ours, theirs:
        command = [sys.executable, "-u", "-m", "deskrl.core.cli", "up", str(absent)]
        assert subprocess.run(command, stderr=theirs, timeout=60).returncode == 2
        first_write = ours.recv(65536).decode()
    assert first_write.startswith(f"deskrl: {absent}: ")
    assert first_write.endswith("\n")
    assert first_write.count("\n") == 1
