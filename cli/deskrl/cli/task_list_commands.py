"""Output and exit statuses of `deskrl tasks check|subset|fetch|noisy`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.actor.tasks.assets import asset_dir
from deskrl.actor.tasks.list_report import ListReport, ValidTask, as_json, check_list
from deskrl.actor.tasks.noise import NoiseLevel, write_noisy_list
from deskrl.actor.tasks.task_lists import balanced_subset, load_list, read_list, write_list
from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from deskrl.actor.tasks.asset_fetch import FetchResult

_COUNT_LABELS = {
    "tasks": "on the list",
    "missing": "not found",
    "invalid": "invalid",
    "valid": "valid",
    "infeasible": "infeasible",
    "missing_applications": "require an application that is not installed",
    "missing_programs": "require a program that is not installed",
    "network": "require network access",
    "accounts": "require an account",
    "missing_files": "require a file that is not cached",
    "missing_local_files": "require a file of this machine that does not exist",
    "missing_capabilities": "require root privileges, the trash or another capability that this desktop lacks",
    "setup_steps": "require a setup step that is not built in",
    "evaluators": "require an evaluator that is neither built in nor installed",
    "met": "requirements are met",
}
"""Labels of the counts of a report. A task counts under each of its requirements."""


def check(path: Path, root: Path | None = None, suffix: str | None = None, *, as_document: bool = False) -> int:
    """Check a task list and print the report, as tables or as one JSON document.

    Returns:
        Exit status: 1 if a task of the list does not exist, else 0.

    Raises:
        UserError: the list is malformed, or a task file is; in the latter case after the report is printed.
    """
    report = check_list(path, root, suffix)
    if as_document:
        _print_json(as_json(report))
    else:
        _print_report(report)
    if report.invalid:
        others = f" (and {len(report.invalid) - 1} more)" if len(report.invalid) > 1 else ""
        error = report.invalid[0].error
        raise UserError(f"{error.message}{others}", error.hint)
    return 1 if report.missing else 0


def subset(path: Path, num_tasks: int, seed: int = 0, out: Path | None = None) -> int:
    """Write a balanced subset of a task list to a file, or print it; return the exit status.

    Raises:
        UserError: the list is malformed or too short, or the file cannot be written.
    """
    chosen = balanced_subset(read_list(path), num_tasks, seed)
    if out is None:
        _print_json(chosen)
        return 0
    try:
        write_list(out, chosen)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}", "give a path in an existing directory"
        ) from error
    print(f"{out}: {_count(num_tasks, 'task')}: " + ", ".join(f"{name} {len(ids)}" for name, ids in chosen.items()))
    return 0


def noisy(path: Path, out: Path, level: NoiseLevel, seed: int = 0, root: Path | None = None) -> int:
    """Write a noisy variant of each task of a list and print what was left out; return the exit status.

    Raises:
        UserError: the list or a task file is malformed, a task does not exist, or a file cannot be written.
    """
    variants = write_noisy_list(path, out, level, seed, root)
    for variant in variants:
        for reason in variant.leaves_out:
            print(f"{variant.task.application}/{variant.task.id}: without {reason}")
    num_reduced = sum(bool(variant.leaves_out) for variant in variants)
    print(f"{out / path.name}: {_count(len(variants), 'task')} with {level} noise, reduced for {num_reduced} of them")
    return 0


def fetch(path: Path, root: Path | None = None, suffix: str | None = None, num_workers: int = 4) -> int:
    """Fetch the files that the tasks of a list use into the asset cache, and print the result of each.

    Returns:
        Exit status: 1 if a file cannot be fetched, else 0.

    Raises:
        UserError: the list or a task file is malformed, or a task does not exist.
    """
    from deskrl.actor.tasks.asset_fetch import fetch_assets, find_task_assets

    if num_workers < 1:
        raise UserError(f"--jobs: must be at least 1, not {num_workers}", "give a positive number")
    assets = find_task_assets(load_list(path, root, suffix))
    results = fetch_assets(
        list(assets.uncached), num_workers, on_result=lambda result: _print_fetched(result, assets.uncached[result.url])
    )
    num_failed = sum(bool(result.error) for result in results)
    received = sum(result.received_bytes for result in results)
    print(
        f"{asset_dir()}: {_count(assets.num_cached + len(results), 'file')}: {assets.num_cached} already cached, "
        f"{len(results) - num_failed} fetched ({_size(received)} transferred), {num_failed} failed"
    )
    return 1 if num_failed else 0


def _print_fetched(result: FetchResult, task_ids: Sequence[str]) -> None:
    failure = f"failed: {result.error} (required by {', '.join(task_ids)})"
    print(f"{result.url}: {failure if result.error else _size(result.num_bytes)}", flush=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _print_json(document: dict[str, Any]) -> None:
    from rich.console import Console  # unlike print, it exits without a traceback if the reader closes the pipe

    Console().out(json.dumps(document, indent=2, ensure_ascii=False), highlight=False)


def _print_report(report: ListReport) -> None:
    from deskrl.core.console import table_console

    console = table_console()
    for name in report.applications:
        console.print(_tasks_table(name, report.for_application(name)))
    console.print(_counts_table(report))
    for line in _summary_lines(report):
        console.print(line, soft_wrap=True, highlight=False)


def _tasks_table(application: str, part: ListReport) -> Table:
    """Return a table with one row for each task of an application."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{escape(application)}: {_count(part.num_tasks, 'task')}"
    table = Table("task", "requirements", title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for missing in part.missing:
        table.add_row(escape(missing.id), "[red]not found")
    for invalid in part.invalid:
        table.add_row(escape(invalid.listed.id), f"[red]invalid: {escape(str(invalid.error))}")
    for task in part.valid:
        table.add_row(escape(task.listed.id), _requirements_text(task))
    return table


def _requirements_text(task: ValidTask) -> RenderableType:
    """Return the requirements of a task as text, with unmet and unverifiable ones highlighted."""
    from rich.text import Text

    required = task.requirements
    files = f"{len(task.missing_files)} of {_count(len(required.files), 'file')} not cached"
    parts = [
        ("infeasible" if task.infeasible else "", "cyan"),
        (", ".join(name for name in required.applications if name not in task.missing_applications), "green"),
        (_labelled("not installed", (*task.missing_applications, *task.missing_programs)), "yellow"),
        (_labelled("network", required.network), "yellow"),
        (_labelled("account", required.accounts), "yellow"),
        (files if task.missing_files else "", "yellow"),
        (_labelled("file not found", task.missing_local_files), "yellow"),
        (_labelled("desktop lacks", task.missing_capabilities), "yellow"),
        (_labelled("unknown setup step", required.setup_steps), "magenta"),
        (_labelled("unknown getter", required.getters if task.is_evaluator_missing else ()), "magenta"),
        (_labelled("unknown metric", required.metrics if task.is_evaluator_missing else ()), "magenta"),
        ("met" if task.are_requirements_met else "", "bold green"),
    ]
    return Text(" · ").join(Text(text, style) for text, style in parts if text)


def _labelled(label: str, names: tuple[str, ...]) -> str:
    return f"{label}: {', '.join(names)}" if names else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _counts_table(report: ListReport) -> Table:
    """Return a table with one row for each count: of the whole list, and of applications with a count above 0."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table("", "tasks", "by application", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    totals = report.counts()
    parts = {name: report.for_application(name).counts() for name in report.applications}
    for key, label in _COUNT_LABELS.items():
        by_application = ", ".join(f"{name} {counts[key]}" for name, counts in parts.items() if counts[key])
        table.add_row(label, str(totals[key]), Text(by_application))
    return table


def _summary_lines(report: ListReport) -> list[str]:
    from rich.markup import escape

    counts = report.counts()
    lines = [f"[red]not found[/]: {escape(f'{task.application}/{task.id}: {task.file}')}" for task in report.missing]
    summary = f"{counts['valid']} of {_count(counts['tasks'], 'task')} valid; requirements met for {counts['met']}"
    return [*lines, summary]
