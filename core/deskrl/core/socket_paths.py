"""Lengths of Unix socket paths, which the kernel limits."""

from __future__ import annotations

import tempfile
from pathlib import Path

from deskrl.core.errors import UserError

MAX_SOCKET_PATH_BYTES = 107
"""Maximum length of a path in `sockaddr_un` of Linux, without the final zero byte."""


def check_socket_path(path: Path) -> None:
    """Raise UserError if a path below the directory for temporary files is too long for a Unix socket."""
    num_bytes, root = len(bytes(path)), Path(tempfile.gettempdir())
    if num_bytes <= MAX_SOCKET_PATH_BYTES:
        return
    room = MAX_SOCKET_PATH_BYTES - (num_bytes - len(bytes(root)))
    raise UserError(
        f"{path}: {num_bytes} bytes are too long for the path of a Unix socket, at most {MAX_SOCKET_PATH_BYTES} are "
        "possible",
        f"set TMPDIR to a directory whose path has at most {room} bytes, such as /tmp"
        if path.is_relative_to(root)
        else "choose a directory with a shorter path",
    )
