"""File access shared by all roles: atomic writes, and JSON objects read with errors for users."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deskrl.core.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that readers, also those after a crash, see either its old or its new content in full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


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
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object", hint)
    return value
