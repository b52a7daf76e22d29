"""Entry point of `deskrl sweep`: runs what is not complete, then reports on all complete runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deskrl.analysis.sweep import sweep_page
from deskrl.analysis.sweep.sweep_config import Sweep, read_sweep
from deskrl.analysis.sweep.sweep_runner import is_complete, run_pending, shortfall, sweep_lock
from deskrl.core.process_lifecycle import stop_event


def sweep(path: Path, overrides: Sequence[str], runs: Path | None, *, dry: bool) -> int:
    """Run or resume a sweep.

    Args:
        path: sweep file.
        overrides: command line options for every run.
        runs: parent directory of the sweep; None for that of the run configuration.
        dry: print the state and command of each run, and run nothing.

    Returns:
        The exit status: 0 if all runs are complete, 1 if one is not, 130 if the sweep was stopped.

    Raises:
        UserError: invalid input; nothing was run.
    """
    config = read_sweep(path, overrides, runs)
    for run in config.runs:
        is_complete(run)  # raises if the run was made with another configuration
    if dry:
        _print_plan(config)
        return 0
    stop = stop_event()
    with sweep_lock(config):
        missing = run_pending(config, stop, lambda: sweep_page.write_page(config, sweep_page.read_results(config), {}))
        results = sweep_page.read_results(config)
        sweep_page.write_page(config, results, missing)
    sweep_page.print_results(config, results)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    for name, reason in results.short.items():
        print(f"not compared: {name}: {reason}")
    missing |= results.short
    if stop.is_set() and missing:
        print(f"stopped; repeat the command to resume {config.root}")
        return 130
    return 1 if missing else 0


def _print_plan(config: Sweep) -> None:
    for run in config.runs:
        is_started = run.run_dir.metrics.exists()
        state = "to be resumed" if is_started else "to be run"
        if is_complete(run):
            state = shortfall(run, config.env_steps) or "complete"
        print(f"{run.name} ({state}): {run.command}")
