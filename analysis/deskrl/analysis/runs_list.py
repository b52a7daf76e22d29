"""`deskrl runs list`: the runs and evaluations of a folder with state, progress, size and age."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from deskrl.analysis.evaluation.task_sets import task_set_dirs
from deskrl.analysis.formatting import format_age, format_percent, format_size
from deskrl.core.console import table_console
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_control import disk_bytes, is_run_directory, is_running
from deskrl.launch.run_state import has_started_training, is_evaluation, read_state


class RunState(StrEnum):
    """State of a run."""

    STARTING = "starting"
    """Its roles start; nothing was trained or evaluated yet."""
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    """A role failed permanently, or files of the run are damaged."""
    INTERRUPTED = "interrupted"
    """It was stopped or killed; the same command resumes it."""


@dataclass(frozen=True)
class RunSummary:
    """One row of the list."""

    name: str
    """Path relative to the listed folder."""
    kind: str
    """training or evaluation."""
    state: RunState
    updates: int | None
    """Number of updates; None for an evaluation."""
    success_rate: float | None
    """Success rate in the last update of a training run, or over all episodes of a finished evaluation; None before."""
    num_bytes: int
    """Size on disk in bytes."""
    started_unix_s: float
    version: str
    """Version of deskrl that wrote the configuration; empty if it is not known."""


def list_runs(folder: Path, *, as_document: bool = False) -> int:
    """Print the runs of a folder, the newest last; returns the exit status.

    Args:
        folder: directory of runs.
        as_document: print one JSON document.

    Raises:
        UserError: the folder does not exist.
    """
    runs = find_runs(folder)
    if as_document:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return 0
    if not runs:
        print(f"{folder} contains no runs")
        return 0
    table_console().print(_table(runs))
    return 0


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs of a folder and of its sweeps, sorted by their start.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "not found"
        raise UserError(f"{folder}: {what}", "name a folder of runs, which is `runs` in the configuration")
    return sorted((summarise(root, folder) for root in _run_roots(folder)), key=lambda run: run.started_unix_s)


def _run_roots(folder: Path) -> Iterator[Path]:
    if is_run_directory(folder):
        yield folder
        return
    for path in folder.iterdir():
        if (path / "sweep.json").is_file():
            yield from (inner for inner in path.iterdir() if is_run_directory(inner))
        elif is_run_directory(path):
            yield path


def summarise(root: Path, folder: Path) -> RunSummary:
    """Return the row of one run; damaged files give the state `failed`, or count as missing.

    Args:
        root: run directory.
        folder: directory to which the name is relative.
    """
    run_dir = RunDir(root)
    is_eval = is_evaluation(run_dir)
    updates = {line["update"]: line for line in run_dir.read_metrics("update") if "update" in line}
    rate = (
        _evaluated_rate(run_dir) if is_eval else next((updates[n].get("success_rate") for n in [*updates][-1:]), None)
    )
    return RunSummary(
        name=str(root.relative_to(folder)) if root != folder else root.resolve().name,
        kind="evaluation" if is_eval else "training",
        state=_state(run_dir, is_eval=is_eval),
        updates=None if is_eval else len(updates),
        success_rate=rate,
        num_bytes=disk_bytes(root),
        started_unix_s=_started_unix_s(run_dir),
        version=str(_read_object(run_dir.config).get("deskrl_version", "")),
    )


def _state(run_dir: RunDir, *, is_eval: bool) -> RunState:
    try:
        recorded = read_state(run_dir).get("state")
    except UserError:
        recorded = "failed"
    if is_running(run_dir):
        has_begun = any(run_dir.replay.glob("*.sqlite")) if is_eval else has_started_training(run_dir)
        return RunState.RUNNING if has_begun else RunState.STARTING
    if is_eval and all(path.is_file() for path in _summary_paths(run_dir)):
        return RunState.FINISHED
    return RunState(recorded) if recorded in ("finished", "failed") else RunState.INTERRUPTED


def _summary_paths(run_dir: RunDir) -> list[Path]:
    parts = list(task_set_dirs(run_dir.root).values()) or [run_dir.root]
    return [RunDir(part).results / "evaluation.json" for part in parts]


def _evaluated_rate(run_dir: RunDir) -> float | None:
    """Return the success rate over all episodes of an evaluation; None before its end."""
    counts = [_read_object(path).get("all") for path in _summary_paths(run_dir)]
    if not all(isinstance(count, dict) and "num_successes" in count and "num_episodes" in count for count in counts):
        return None
    num_episodes = sum(count["num_episodes"] for count in counts if count)
    return sum(count["num_successes"] for count in counts if count) / num_episodes if num_episodes else None


def _started_unix_s(run_dir: RunDir) -> float:
    try:
        started: float | None = read_state(run_dir).get("started_unix_s")
    except UserError:
        started = None
    if started is not None:
        return started
    return (run_dir.id if run_dir.id.is_file() else run_dir.config).stat().st_mtime


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _table(runs: list[RunSummary]) -> Table:
    table = Table()
    for column in ("run", "kind", "state", "updates", "success", "size", "started", "version"):
        numeric = column in ("updates", "success", "size")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column in ("run", "state"))
    for run in runs:
        updates = "" if run.updates is None else str(run.updates)
        cells = (format_percent(run.success_rate), format_size(run.num_bytes), format_age(run.started_unix_s))
        table.add_row(run.name, run.kind, run.state, updates, *cells, run.version)
    return table
