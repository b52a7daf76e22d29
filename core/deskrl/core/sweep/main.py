"""`deskrl sweep`: run what is not complete, then tell what came of all that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deskrl.core.lifetime import stop_event
from deskrl.core.sweep import page
from deskrl.core.sweep.drive import drive, folder_of, held, is_complete
from deskrl.core.sweep.plan import Sweep, read_sweep


def sweep(path: Path, overrides: Sequence[str], runs: Path | None, *, dry: bool) -> int:
    """Run a sweep, or go on with it.

    Args:
        path: of its file.
        overrides: of every cell, as they stand on the command line.
        runs: folder in which the sweep's lies; None: that of the run configuration.
        dry: say what would be run, and run nothing.

    Returns:
        The exit status: 0 if all cells are complete, 1 if one is not, 130 if it was stopped.

    Raises:
        UserError: bad input; nothing was run.
    """
    asked = read_sweep(path, overrides, runs)
    for cell in asked.cells:
        is_complete(cell)  # raises for one that was made as something else
    if dry:
        _show_plan(asked)
        return 0
    stop = stop_event()
    with held(asked):
        missing = drive(asked, stop, lambda: page.write(asked, page.find(asked), {}))
        findings = page.find(asked)
        page.write(asked, findings, missing)
    page.show(asked, findings)
    missing |= findings.short
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    if stop.is_set() and missing:
        print(f"stopped; the same command goes on with {asked.folder}")
        return 130
    return 1 if missing else 0


def _show_plan(asked: Sweep) -> None:
    for cell in asked.cells:
        is_begun = folder_of(cell).metrics.exists()
        state = "complete" if is_complete(cell) else "to be resumed" if is_begun else "to be run"
        print(f"{cell.name} ({state}): {cell.command}")
