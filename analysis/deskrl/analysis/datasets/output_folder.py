"""Output folders that appear under their name only once they are complete."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from deskrl.core.errors import UserError
from deskrl.core.file_io import report_write_errors

_T = TypeVar("_T")


class OutputFolder:
    """Folder that is being written.

    Args:
        path: its path until it is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_interrupted = False

    def until_interrupted(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield items; raises KeyboardInterrupt instead of the next one once SIGINT or SIGTERM has arrived."""
        for item in items:
            if self._is_interrupted:
                raise KeyboardInterrupt
            yield item

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Raised at once, an exception could be lost in a callback of SQLite or Arrow."""
        self._is_interrupted = True


@contextmanager
def output_folder(out: Path) -> Iterator[OutputFolder]:
    """Yield a new folder that gets the name `out` at the end of the context, and is deleted if an error occurred.

    Raises:
        UserError: `out` exists or cannot be created.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: exists", "choose another folder, or remove this one")
    out = out.absolute()
    if out.name in ("", ".."):
        raise UserError(f"{out}: not the name of a folder", "choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}", "choose another folder") from error
    folder = OutputFolder(partial)
    handlers = {number: signal.signal(number, folder.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield folder
        with report_write_errors(out):
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
