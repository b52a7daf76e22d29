"""What `deskrl tasks check|subset|fetch|noisy` print, and their exit status. Decides nothing about tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.actor.tasks.assets import asset_folder
from deskrl.actor.tasks.check import ListReport, ValidTask, as_json, check_list
from deskrl.actor.tasks.lists import TaskList, balance, load_list, locate, read_list
from deskrl.actor.tasks.needs import absent_files, task_needs
from deskrl.actor.tasks.noise import SUFFIX, Level, make_noisy
from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from deskrl.actor.tasks.asset_fetch import Fetched

_COUNTED = {
    "tasks": "on the list",
    "missing": "do not exist",
    "invalid": "invalid",
    "valid": "valid",
    "infeasible": "infeasible",
    "absent_applications": "need an application that is absent",
    "absent_programs": "need a program that is absent",
    "network": "need the live web",
    "accounts": "need an account",
    "absent_files": "need a file that is not cached",
    "setup_steps": "need a setup step that is not built in",
    "evaluators": "need an evaluator that is neither built in nor installed",
    "met": "need nothing that is known to be absent",
}
"""How the counts are told. A task counts under each need that it has."""


def check(path: Path, root: Path | None = None, suffix: str | None = None, *, as_document: bool = False) -> int:
    """Check a task list and print the report, as tables or as one JSON document.

    Returns:
        The exit status: 1 if a task of the list does not exist, else 0.

    Raises:
        UserError: the list is malformed, or, once the report is printed, a task file is.
    """
    report = check_list(path, root, suffix)
    if as_document:
        _print_json(as_json(report))
    else:
        _print_report(report)
    if report.invalid:
        others = f" (and {len(report.invalid) - 1} more)" if len(report.invalid) > 1 else ""
        error = report.invalid[0].error
        raise UserError(f"{error.message}{others}", error.mend)
    return 1 if report.missing else 0


def subset(path: Path, num_tasks: int, seed: int = 0, out: Path | None = None) -> int:
    """Write a balanced subset of a task list to a file, or print it; returns the exit status.

    Raises:
        UserError: the list is malformed or too short, or the file cannot be written.
    """
    chosen = balance(read_list(path), num_tasks, seed)
    if out is None:
        _print_json(chosen)
        return 0
    try:
        _write_list(out, chosen)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}", "name a file in a folder that exists") from error
    print(f"{out}: {_count(num_tasks, 'task')}: " + ", ".join(f"{name} {len(ids)}" for name, ids in chosen.items()))
    return 0


def noisy(path: Path, out: Path, level: Level, seed: int = 0, root: Path | None = None) -> int:
    """Write a noisy variant of every task of a list, and the list, where `--noisy` looks for them; the exit status.

    Raises:
        UserError: the list or a task file is malformed, a task does not exist, or a file cannot be written.
    """
    listed = read_list(path)
    files = locate(path, listed, root, "")
    tasks = load_list(path, root, "")
    num_short = 0
    try:
        for place, task in zip(files, tasks, strict=True):
            variant = make_noisy(task, level, seed)
            target = out / "examples_noisy" / place.application / f"{place.id}{SUFFIX}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(variant)
            left_out = json.loads(variant)["noise_meta"]["leaves_out"]
            num_short += bool(left_out)
            for reason in left_out:
                print(f"{place.application}/{place.id}: without {reason}")
        _write_list(out / path.name, listed)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}", "name a folder that can be") from error
    print(f"{out / path.name}: {_count(len(tasks), 'task')} with {level} noise, {num_short} of them with less of it")
    return 0


def _write_list(path: Path, listed: TaskList) -> None:
    path.write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fetch(path: Path, root: Path | None = None, suffix: str | None = None, num_at_once: int = 4) -> int:
    """Bring the files that a list's tasks name into the asset cache, and tell of each what came of it.

    Returns:
        The exit status: 1 if a file cannot be had, else 0.

    Raises:
        UserError: the list or a task file is malformed, or a task does not exist.
    """
    from deskrl.actor.tasks.asset_fetch import fetch_assets

    if num_at_once < 1:
        raise UserError(f"--jobs {num_at_once} fetches nothing", "give 1 or more")
    wanting: dict[str, list[str]] = {}
    for task in load_list(path, root, suffix):
        needs = task_needs(task)
        lacking = absent_files(task, needs)
        for url in needs.files:
            wanting.setdefault(url, []).extend([task.id] * (url in lacking))
    absent = [url for url, tasks in wanting.items() if tasks]
    results = fetch_assets(absent, num_at_once, tell=lambda result: _tell_fetched(result, wanting[result.url]))
    failed = [result for result in results if result.error]
    received = sum(result.received_bytes for result in results)
    print(
        f"{asset_folder()}: {_count(len(wanting), 'file')}: {len(wanting) - len(absent)} were there, "
        f"{len(results) - len(failed)} fetched ({_size(received)} transferred), {len(failed)} failed"
    )
    return 1 if failed else 0


def _tell_fetched(result: Fetched, tasks: Sequence[str]) -> None:
    told = f"failed: {result.error} (needed by {', '.join(tasks)})" if result.error else _size(result.num_bytes)
    print(f"{result.url}: {told}", flush=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _print_json(document: dict[str, Any]) -> None:
    from rich.console import Console  # unlike print, it ends quietly when the reader of a pipe has had enough

    Console().out(json.dumps(document, indent=2, ensure_ascii=False), highlight=False)


def _print_report(report: ListReport) -> None:
    from deskrl.core.terminal import table_console

    console = table_console()
    for name in report.applications:
        console.print(_tasks_table(name, report.of(name)))
    console.print(_counts_table(report))
    for line in _closing_lines(report):
        console.print(line, soft_wrap=True, highlight=False)


def _tasks_table(application: str, part: ListReport) -> Table:
    """One line for each task of an application."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "task", "needs", title=f"{escape(application)}: {_count(part.num_tasks, 'task')}", title_justify="left"
    )
    table.columns[0].no_wrap = True
    for missing in part.missing:
        table.add_row(escape(missing.id), "[red]does not exist")
    for invalid in part.invalid:
        table.add_row(escape(invalid.listed.id), f"[red]invalid: {escape(str(invalid.error))}")
    for task in part.valid:
        table.add_row(escape(task.listed.id), _told(task))
    return table


def _told(task: ValidTask) -> RenderableType:
    """What a task needs, in a line or two; what is absent here, or cannot be told to be here, stands out."""
    from rich.text import Text

    needs = task.needs
    files = f"{len(task.absent_files)} of {_count(len(needs.files), 'file')} not cached"
    parts = [
        ("infeasible" if task.infeasible else "", "cyan"),
        (", ".join(name for name in needs.applications if name not in task.absent_applications), "green"),
        (_tell("absent", (*task.absent_applications, *task.absent_programs)), "yellow"),
        (_tell("live web", needs.network), "yellow"),
        (_tell("account", needs.accounts), "yellow"),
        (files if task.absent_files else "", "yellow"),
        (_tell("no setup step", needs.setup_steps), "magenta"),
        (_tell("no getter", needs.getters if task.unjudged else ()), "magenta"),
        (_tell("no metric", needs.metrics if task.unjudged else ()), "magenta"),
        ("needs met" if task.met else "", "bold green"),
    ]
    return Text(" · ").join(Text(text, style) for text, style in parts if text)


def _tell(what: str, names: tuple[str, ...]) -> str:
    return f"{what}: {', '.join(names)}" if names else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _counts_table(report: ListReport) -> Table:
    """A line for each count: of the whole list, and of the applications where it is not 0."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table("", "tasks", "by application", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    whole = report.counts()
    parts = {name: report.of(name).counts() for name in report.applications}
    for key, told in _COUNTED.items():
        by_application = ", ".join(f"{name} {counts[key]}" for name, counts in parts.items() if counts[key])
        table.add_row(told, str(whole[key]), Text(by_application))
    return table


def _closing_lines(report: ListReport) -> list[str]:
    from rich.markup import escape

    counts = report.counts()
    told = f"{counts['valid']} of {_count(counts['tasks'], 'task')} valid"
    lines = [
        f"[red]does not exist[/]: {escape(f'{task.application}/{task.id}: there is no {task.file}')}"
        for task in report.missing
    ]
    return [*lines, f"{told}; nothing is known to be absent here for {counts['met']} of them"]
