"""Lengths of socket paths: a directory for temporary files that is too long is rejected before the start."""

from __future__ import annotations

import re
import socket
import tempfile
from pathlib import Path

import pytest

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.socket_paths import MAX_SOCKET_PATH_BYTES, check_socket_path
from deskrl.launch import preflight


def temporary_root(num_bytes: int) -> str:
    """Return the path of a directory that need not exist, as long as stated."""
    return f"/{'t' * (num_bytes - 1)}"


def test_the_limit_is_that_of_the_kernel() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    longest = folder / ("s" * (MAX_SOCKET_PATH_BYTES - len(bytes(folder)) - 1))
    check_socket_path(longest)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bytes(longest))
    longest.unlink()
    folder.rmdir()
    with pytest.raises(UserError), socket.socket(socket.AF_UNIX) as listener:
        check_socket_path(Path(f"{longest}s"))


@pytest.mark.parametrize("provider", ["embedded", "docker", "remote"])
def test_the_hint_states_the_longest_directory_that_works(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.model_validate({"runs": tmp_path, "desktop": {"provider": provider}})
    monkeypatch.setattr(tempfile, "tempdir", temporary_root(101))
    with pytest.raises(UserError, match=r"too long for the path of a Unix socket, at most 107") as rejected:
        preflight.check_socket_paths(config)
    stated = re.search(r"set TMPDIR to a directory whose path has at most (\d+) bytes", rejected.value.hint)
    assert stated is not None
    room = int(stated[1])
    assert room >= 25
    monkeypatch.setattr(tempfile, "tempdir", temporary_root(room + 1))
    with pytest.raises(UserError):
        preflight.check_socket_paths(config)
    if provider != "embedded":  # vLLM's sockets have the longer paths there
        monkeypatch.setattr(tempfile, "tempdir", temporary_root(25))
        preflight.check_socket_paths(config)
