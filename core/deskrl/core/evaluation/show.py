"""An evaluation's summary as a person reads it. Counts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deskrl.core.evaluation.sets import evaluation_name
from deskrl.core.runfolder import RunFolder
from deskrl.core.terminal import table_console
from deskrl.core.timings import PARTS


def show(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print it."""
    table = Table("", "tasks", "success", "95 %", "average reward", "not counted", title=evaluation_name(folder.root))
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
        pace = f"{summary['steps_per_episode']:.1f} steps and {summary['seconds_per_episode']:.1f} s an episode"
        console.print(pace, highlight=False)
        console.print(_timings(summary["timings_ms"]))
    if (server := summary.get("external")) is not None:
        lost = ", ".join(server["lost"])
        console.print(f"{server['model']} acted at {server['url']}; not known: {lost}", highlight=False)
    if summary["uncounted"]:
        causes = ", ".join(f"{num} of {cause}" for cause, num in summary["uncounted"].items())
        console.print(
            f"not counted: {causes}; {folder.results / 'task_results'} tells more", highlight=False, soft_wrap=True
        )
    if summary["left_out"]:
        console.print(f"{len(summary['left_out'])} tasks are left out; {folder.root / 'left_out.json'} tells why")
    console.print(f"results: {folder.results}", highlight=False, soft_wrap=True)


def _timings(by_part: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("of a step", box=SIMPLE_HEAD)
    for header in ("median ms", "90 % within ms"):
        table.add_column(header, justify="right")
    for part, spread in by_part.items():
        table.add_row(PARTS[part], f"{spread['median']:.1f}", f"{spread['p90']:.1f}")
    return table
