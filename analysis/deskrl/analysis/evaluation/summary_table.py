"""Terminal output of an evaluation's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deskrl.analysis.evaluation.task_sets import evaluation_name
from deskrl.core.console import table_console
from deskrl.core.latency_breakdown import PARTS
from deskrl.core.run_dir import RunDir

_MAX_REASONS = 12


def print_summary(summary: dict[str, Any], run_dir: RunDir) -> None:
    """Print the summary of the evaluation in this directory."""
    table = Table(
        "",
        "tasks",
        "success",
        "95 %",
        "mean reward",
        "not counted",
        title=evaluation_name(run_dir.root),
        title_justify="left",
    )
    rows: Sequence[tuple[str, dict[str, Any]]] = [
        ("all", summary["all"]),
        ("feasible only", summary["feasible"]),
        *(summary["applications"].items()),
    ]
    for name, rate in rows:
        share = "–" if rate["rate"] is None else f"{rate['rate']:.0%}"
        average = "–" if rate["average_reward"] is None else f"{rate['average_reward']:.2f}"
        success = f"{rate['num_successes']}/{rate['num_episodes']} = {share}"
        interval = f"[{rate['low']:.0%}, {rate['high']:.0%}]"
        table.add_row(name, str(rate["num_tasks"]), success, interval, average, str(rate["num_faulted"]))
    console = table_console()
    console.print(table)
    if summary["steps_per_episode"] is not None:
        lengths = f"{summary['steps_per_episode']:.1f} steps and {summary['seconds_per_episode']:.1f} s per episode"
        console.print(lengths, highlight=False)
        console.print(_latency_table(summary["timings_ms"]))
    if (server := summary.get("external")) is not None:
        unavailable = ", ".join(server["lost"])
        console.print(f"policy: {server['model']} at {server['url']}; unavailable: {unavailable}", highlight=False)
    console.print(_tasks_table(summary))
    if summary["uncounted"]:
        causes = ", ".join(f"{num} x {cause}" for cause, num in summary["uncounted"].items())
        console.print(f"not counted: {causes}; details: {run_dir.task_results}", highlight=False, soft_wrap=True)
    console.print(_outcome(summary, run_dir), highlight=False, soft_wrap=True)
    console.print(f"results: {run_dir.results}", highlight=False, soft_wrap=True)


def count_reasons(left_out: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """Return the number of tasks that were left out for each reason, most frequent first; a task can have several."""
    return Counter(reason for reasons in left_out.values() for reason in dict.fromkeys(reasons)).most_common()


def _tasks_table(summary: Mapping[str, Any]) -> Table:
    """Return a table in which every listed task is counted: evaluated, without a counted episode, or left out."""
    table = Table("tasks", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    num_tasks, left_out = summary["all"]["num_tasks"], summary["left_out"]
    num_without = sum(task["num_episodes"] == 0 for task in summary["tasks"].values())
    table.add_row("listed", str(num_tasks + len(left_out)))
    table.add_row("evaluated", str(num_tasks - num_without))
    if num_without:
        table.add_row("without an episode that counts", str(num_without))
    table.add_row("left out", str(len(left_out)))
    for reason, num in count_reasons(left_out)[:_MAX_REASONS]:
        table.add_row(f"  {escape(reason)}", str(num))
    return table


def _outcome(summary: Mapping[str, Any], run_dir: RunDir) -> str:
    """Return the last line about the tasks: success, pass@k of repeated tasks, and what was left out."""
    rate, left_out = summary["all"], summary["left_out"]
    parts = [f"{rate['num_successes']} of {rate['num_episodes']} episodes succeeded"]
    passed = [f"pass@{k} {it['rate']:.0%} [{it['low']:.0%}, {it['high']:.0%}]" for k, it in _repeated(summary)]
    parts += [", ".join(passed)] if passed else []
    num_listed = rate["num_tasks"] + len(left_out)
    if left_out:
        parts.append(f"{len(left_out)} of {num_listed} tasks were left out, for the reasons in {run_dir.left_out}")
    else:
        parts.append(f"none of the {num_listed} tasks was left out")
    return "; ".join(parts)


def _repeated(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return pass@k for k above 1."""
    return [(k, it) for k, it in summary.get("pass_at_k", {}).items() if k != "1"]


def _latency_table(by_part: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("part of a step", box=SIMPLE_HEAD)
    for header in ("median ms", "90th percentile ms"):
        table.add_column(header, justify="right")
    for part, spread in by_part.items():
        table.add_row(PARTS[part], f"{spread['median']:.1f}", f"{spread['p90']:.1f}")
    return table
