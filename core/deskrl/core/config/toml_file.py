"""Reading and errors of TOML files that have a schema of their own, beside the run configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deskrl.core.errors import UserError


def read_toml(path: Path, missing_hint: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        path: TOML file.
        missing_hint: hint for the user if there is no such file.

    Raises:
        UserError: the file is missing, or cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found", missing_hint) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}", "correct the file") from error


def invalid_keys_error(error: ValidationError, path: Path) -> UserError:
    """Return the error for a TOML file that its schema rejects, with all invalid keys."""
    reasons = ("{}: {}".format(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors())
    return UserError(f"{path}: {'; '.join(reasons)}", "correct or remove the key")
