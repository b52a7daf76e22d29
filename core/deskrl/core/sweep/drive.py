"""Runs the cells of a sweep one after another: complete ones are skipped, interrupted ones resumed, failed ones told.

Knows `deskrl up` as a command and what it leaves in a run's folder; knows nothing of what a cell learns.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent, supervised_environment
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.begun import is_finished, refuse_other_config
from deskrl.core.running.live import clock
from deskrl.core.running.supervisor import last_line_of
from deskrl.core.sweep.plan import START, Cell, Sweep, cell_name

_POLL_S = 0.2
_INTERRUPTED = 130


def folder_of(cell: Cell) -> RunFolder:
    """The cell's run."""
    return RunFolder(cell.config.folder)


def is_complete(cell: Cell) -> bool:
    """Whether the cell's run came to its end, as what the sweep asks for.

    Raises:
        UserError: it came to its end as something else.
    """
    folder = folder_of(cell)
    if not is_finished(folder):
        return False
    refuse_other_config(cell.config, folder)
    return True


@contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """Nobody else drives this sweep meanwhile.

    Raises:
        UserError: somebody does, or nothing can be kept there.
    """
    try:
        (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{sweep.folder}: no sweep can be kept here ({error.strerror})", "choose other --runs"
        ) from error
    with open(sweep.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{sweep.folder} is being swept by another process", "wait for that one") from error
        yield


def drive(sweep: Sweep, stop: StopEvent, after_each: Callable[[], None]) -> dict[str, str]:
    """Run what is not complete; returns why cells are not, by name. A stop ends the cell that runs, in good order.

    Args:
        sweep: all of whose complete cells were made as it says.
        stop: asked for.
        after_each: called whenever a cell of an arm has been completed.
    """
    missing: dict[str, str] = {}
    num_cells = len(sweep.cells)
    for number, cell in enumerate(sweep.cells, start=1):
        place = f"[{number}/{num_cells}] {cell.name}"
        if is_complete(cell):
            _tell(f"{place}: complete")
            continue
        if stop.is_set():
            missing[cell.name] = "not run: stopped"
            continue
        if cell_name(START, cell.seed) in missing:
            missing[cell.name] = "not run: its start is missing"
            _tell(f"{place}: {missing[cell.name]}")
            continue
        _tell(f"{place}: {'resuming' if folder_of(cell).metrics.exists() else 'running'}; log {log_of(sweep, cell)}")
        started_s = time.monotonic()
        why = _run(cell, log_of(sweep, cell), stop)
        _tell(f"{place}: {why or 'complete'} after {clock(time.monotonic() - started_s)}")
        if why:
            missing[cell.name] = why
        elif cell.arm != START:
            after_each()
    return missing


def log_of(sweep: Sweep, cell: Cell) -> Path:
    """What the cell's command prints."""
    return sweep.folder / "logs" / f"{cell.name}.log"


def _run(cell: Cell, log: Path, stop: StopEvent) -> str:
    """Run one cell to its end; why it did not get there, or nothing."""
    command = [sys.executable, "-m", "deskrl.core.cli", "up", str(cell.path), *cell.options]
    environment = {**os.environ, **supervised_environment(), "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as output:
        log_start = output.tell()
        # In a session of its own: Ctrl-C reaches it once, through this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        while (status := process.poll()) is None:
            if stop.wait(_POLL_S):
                process.terminate()
                status = process.wait()
                break
    if is_finished(folder_of(cell)):  # a run that does not meet all of its criteria is complete all the same
        return ""
    if status == _INTERRUPTED and stop.is_set():
        return "stopped"
    return f"failed with status {status}: {last_line_of(log, log_start)}"


def _tell(line: str) -> None:
    print(line, flush=True)
