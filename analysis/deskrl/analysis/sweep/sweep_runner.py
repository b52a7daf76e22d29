"""Executes the runs of a sweep one by one: skips complete ones, resumes interrupted ones, reports failed ones."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deskrl.analysis.report.run_history import read_history
from deskrl.analysis.sweep.sweep_config import START, Sweep, SweepRun, run_name
from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import StopEvent, supervised_environment
from deskrl.launch.live_display import format_minutes
from deskrl.launch.run_state import check_same_config, is_finished
from deskrl.launch.supervisor import last_line_of

_POLL_S = 0.2
_INTERRUPTED = 130


def is_complete(run: SweepRun) -> bool:
    """Return whether a run is finished.

    Raises:
        UserError: it is finished, but was made with another configuration.
    """
    run_dir = run.run_dir
    if not is_finished(run_dir):
        return False
    check_same_config(run.config, run_dir)
    return True


def shortfall(run: SweepRun, env_steps: int) -> str:
    """Return why a finished run cannot be compared; empty if it can.

    Args:
        run: a run that is finished.
        env_steps: environment steps at which the arms are compared.
    """
    if run.arm == START:
        return ""
    num_steps = sum(update["num_env_steps"] for update in read_history(run.run_dir).updates)
    if num_steps >= env_steps:
        return ""
    return f"ended after {num_steps} of {env_steps} steps: remove it and raise learner.grpo.num_updates"


@contextmanager
def sweep_lock(sweep: Sweep) -> Iterator[None]:
    """Hold the exclusive lock of a sweep.

    Raises:
        UserError: another process holds it, or the directory is not writable.
    """
    try:
        (sweep.root / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{sweep.root}: not writable: {error.strerror}", "choose another directory with --runs"
        ) from error
    with open(sweep.root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{sweep.root}: another process is running this sweep", "wait until it has ended"
            ) from error
        yield


def run_pending(sweep: Sweep, stop: StopEvent, after_each: Callable[[], None]) -> dict[str, str]:
    """Execute all runs that are not complete, one after another. A stop ends the current one gracefully.

    Args:
        sweep: sweep whose complete runs were made with the same configuration.
        stop: event that requests a stop.
        after_each: called after each completed run of an arm.

    Returns:
        The reasons of runs that are not complete, by name.
    """
    missing: dict[str, str] = {}
    for number, run in enumerate(sweep.runs, start=1):
        label = f"[{number}/{len(sweep.runs)}] {run.name}"
        if is_complete(run):
            _print(f"{label}: {shortfall(run, sweep.env_steps) or 'complete'}")
            continue
        if stop.is_set():
            missing[run.name] = "not run: stopped"
            continue
        if run_name(START, run.seed) in missing:
            missing[run.name] = "not run: the warm start of its seed is missing"
            _print(f"{label}: {missing[run.name]}")
            continue
        _print(f"{label}: {'resuming' if run.run_dir.metrics.exists() else 'running'}; log {log_path(sweep, run)}")
        started_s = time.monotonic()
        reason = _run(run, log_path(sweep, run), stop)
        outcome = reason or shortfall(run, sweep.env_steps) or "complete"
        _print(f"{label}: {outcome}; {format_minutes(time.monotonic() - started_s)}")
        if reason:
            missing[run.name] = reason
        elif run.arm != START:
            after_each()
    return missing


def log_path(sweep: Sweep, run: SweepRun) -> Path:
    """Return the log file of a run's command."""
    return sweep.root / "logs" / f"{run.name}.log"


def _run(run: SweepRun, log: Path, stop: StopEvent) -> str:
    """Execute one run to its end; returns why it is not complete, empty if it is."""
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(run.path), *run.options]
    environment = {**os.environ, **supervised_environment(), "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as output:
        log_start = output.tell()
        # A new session, so that Ctrl-C reaches it only once, through this process.
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
    if is_finished(run.run_dir):  # complete even if it fails an acceptance criterion
        return ""
    if status == _INTERRUPTED and stop.is_set():
        return "stopped"
    return f"failed with status {status}: {last_line_of(log, log_start)}"


def _print(line: str) -> None:
    print(line, flush=True)
