"""Output folders that appear under their name only once they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deskrl.core.errors import UserError


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder that gets the name `out` at the end of the context, and is deleted if an error occurred.

    Raises:
        UserError: `out` exists or cannot be created.
    """
    if out.exists():
        raise UserError(f"{out}: exists", "choose another folder, or remove this one")
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}", "choose another folder") from error
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
