"""File access shared by all roles: atomic writes, and reads and writes whose errors are for users."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deskrl.core.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that readers, also those after a crash, see either its old or its new content in full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # such as a full disk, of which the rest of the file would take more
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into a UserError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written: {reason}", "free some space, or choose another disk") from error


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading, also through a link.

    Raises:
        OSError: it cannot be opened, or is not a regular file: a pipe would block, and a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: file to read.
        hint: hint of the error, as an imperative.

    Raises:
        UserError: the file is missing or unreadable, is not valid JSON, or holds another value than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found", hint) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object", hint)
    return value
