"""Output folders that appear under their name only once they are complete."""

from __future__ import annotations

import fcntl
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
_LOCK = ".lock"


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
        UserError: `out` exists, cannot be created, or is being written by another process.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: exists", "choose another folder, or remove this one")
    out = out.absolute()
    if out.name in ("", ".."):
        raise UserError(f"{out}: not the name of a folder", "choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    lock = _lock_empty_folder(partial, out)
    folder = OutputFolder(partial)
    handlers = {number: signal.signal(number, folder.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield folder
        with report_write_errors(out):
            (partial / _LOCK).unlink()
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _lock_empty_folder(partial: Path, out: Path) -> int:
    """Make a folder, or empty the one that a killed process left; return a descriptor that holds its lock."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in set(partial.iterdir()) - {partial / _LOCK}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except BaseException:
            os.close(lock)
            raise
    except BlockingIOError:
        raise UserError(f"{out}: another process is writing it", "wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}", "choose another folder") from error
    return lock
