"""What a sweep tells: `sweep.html`, which needs nothing but itself, `sweep.json` beside it, a table in the terminal.

Knows words, tables and charts; the numbers are `verdict`'s and `curves`'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from deskrl.core.config import dotted
from deskrl.core.report.charts import Band, Chart, Line, line_chart
from deskrl.core.report.history import read_history
from deskrl.core.report.templating import source, templates
from deskrl.core.runfolder import write_atomically, write_json
from deskrl.core.sweep.curves import WINDOW_SHARE, Place, by_minutes, by_steps
from deskrl.core.sweep.drive import folder_of, is_complete
from deskrl.core.sweep.plan import START, Cell, Sweep
from deskrl.core.sweep.verdict import ArmResult, Difference, Interval, Trial, judge_arms, judge_run

_NUM_COLOURS = 4


@dataclass(frozen=True)
class Findings:
    """All that is known of a sweep by now."""

    complete: frozenset[str]
    """Cells, by name."""
    trials: dict[str, dict[int, Trial]]
    """By arm and seed."""
    short: dict[str, str]
    """Cells that ended before their steps were used up, by name: what is to be done."""
    arms: list[ArmResult]
    differences: list[Difference]
    by_steps: dict[str, list[Place]]
    by_minutes: dict[str, list[Place]]


def find(sweep: Sweep) -> Findings:
    """Read the complete cells."""
    trials: dict[str, dict[int, Trial]] = {arm: {} for arm in sweep.file.arms}
    short: dict[str, str] = {}
    complete = frozenset(cell.name for cell in sweep.cells if is_complete(cell))
    for cell in sweep.cells:
        if cell.arm == START or cell.name not in complete:
            continue
        updates = read_history(folder_of(cell)).updates
        num_steps = sum(update["num_env_steps"] for update in updates)
        if num_steps < sweep.env_steps:
            short[cell.name] = f"ended after {num_steps} steps: remove it and raise learner.grpo.num_updates"
        else:
            trials[cell.arm][cell.seed] = judge_run(updates, sweep.env_steps)
    arms, differences = judge_arms(trials)
    runs = {arm: [trial.learning for trial in by_seed.values()] for arm, by_seed in trials.items() if by_seed}
    return Findings(
        complete,
        trials,
        short,
        arms,
        differences,
        {arm: by_steps(of_arm, sweep.env_steps) for arm, of_arm in runs.items()},
        {arm: by_minutes(of_arm, sweep.env_steps) for arm, of_arm in runs.items()},
    )


def write(sweep: Sweep, findings: Findings, missing: Mapping[str, str]) -> None:
    """Write both files.

    Args:
        sweep: what was asked.
        findings: what came of it.
        missing: why cells are not complete, by name; of those that are not there it is not known yet.
    """
    missing = {**missing, **findings.short}
    write_json(sweep.folder / "sweep.json", _finite(_document(sweep, findings, missing)))
    environment = templates()
    series = {arm: number % _NUM_COLOURS for number, arm in enumerate(sweep.file.arms)}
    html = environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        about=_about(sweep),
        window=round(WINDOW_SHARE * sweep.env_steps),
        results=findings.arms,
        differences=findings.differences,
        charts=_charts(findings, series),
        series=series,
        rows=[_row(cell, sweep, findings, missing) for cell in sweep.cells],
        num_missing=len(sweep.cells) - len(findings.complete - findings.short.keys()),
        level=level_text,
        change=change_text,
        ratio=ratio_text,
        minutes=minutes_text,
        style=source(environment, "report.css"),
    )
    write_atomically(sweep.folder / "sweep.html", html.encode())


def show(sweep: Sweep, findings: Findings) -> None:
    """Print what was found."""
    console = Console()
    arms = Table(title=f"{sweep.file.name}, {sweep.env_steps} environment steps a run", title_justify="left")
    for column in ("arm", "seeds", "success", "in the last quarter", "minutes"):
        arms.add_column(column)
    for arm in findings.arms:
        row = (level_text(arm.success), level_text(arm.last_success), minutes_text(arm.minutes))
        arms.add_row(arm.arm, str(arm.num_seeds), *row)
    console.print(arms)
    if findings.differences:
        table = Table()
        for column in ("difference", "seeds", "success", "in the last quarter", "wall clock"):
            table.add_column(column)
        for it in findings.differences:
            row = (change_text(it.success), change_text(it.last_success), ratio_text(it.minutes_ratio))
            table.add_row(f"{it.arm} - {it.against}", str(it.num_seeds), *row)
        console.print(table)
        console.print("means over seeds, [95 % intervals of Student's t]", highlight=False, markup=False)
    console.print(f"report: {sweep.folder / 'sweep.html'}", highlight=False, soft_wrap=True)


def level_text(it: Interval) -> str:
    """A success rate: 61 % [52, 70]."""
    ends = f" [{max(0.0, it.low):.0%}, {min(1.0, it.high):.0%}]" if it.tells else ""
    return f"{it.mean:.0%}{ends}"


def change_text(it: Interval) -> str:
    """A difference of two: +12 points [-3, +27]."""
    ends = f" [{100 * it.low:+.0f}, {100 * it.high:+.0f}]" if it.tells else ""
    return f"{100 * it.mean:+.0f} points{ends}"


def ratio_text(it: Interval) -> str:
    """A ratio: x 0.45 [0.40, 0.51]."""
    ends = f" [{it.low:.2f}, {it.high:.2f}]" if it.low > 0 else ""
    return f"x {it.mean:.2f}{ends}"


def minutes_text(it: Interval) -> str:
    """Minutes: 3.4 [3.1, 3.7]."""
    ends = f" [{max(0.0, it.low):.1f}, {it.high:.1f}]" if it.tells else ""
    return f"{it.mean:.1f}{ends}"


def _about(sweep: Sweep) -> list[str]:
    """What else belongs to the experiment."""
    config = next(cell.config for cell in sweep.cells if cell.arm != START)
    told = [f"{config.desktop.num_envs} {config.desktop.provider} desktops"]
    if config.desktop.provider == "embedded" and config.desktop.embedded.adds_time:
        told.append(f"made slower: {config.desktop.embedded.describe()}")
    return told


def _charts(findings: Findings, series: Mapping[str, int]) -> list[Chart]:
    shown = (
        ("Success against environment steps", "environment steps", findings.by_steps),
        ("Success against wall clock", "minutes of training", findings.by_minutes),
    )
    return [_chart(title, x_title, curves, series) for title, x_title, curves in shown]


def _chart(title: str, x_title: str, curves: Mapping[str, list[Place]], series: Mapping[str, int]) -> Chart:
    lines, bands = [], []
    for arm, places in curves.items():
        lines.append(Line([(0.0, None), *((place.x, place.mean) for place in places)], series=series[arm]))
        bands.append(Band([(place.x, place.low, place.high) for place in places if place.has_interval], series[arm]))
    return line_chart(title, lines, x_title=x_title, percent=True, bands=bands, width=560, height=350)


def _row(cell: Cell, sweep: Sweep, findings: Findings, missing: Mapping[str, str]) -> dict[str, Any]:
    changes = sweep.file.arms.get(cell.arm, {})
    is_done = cell.name in findings.complete
    return {
        "name": cell.name,
        "is_start": cell.arm == START and is_done,
        "trial": findings.trials.get(cell.arm, {}).get(cell.seed),
        "why": missing.get(cell.name, "the warm start of this seed" if is_done else "not run yet"),
        "changes": ", ".join(f"{key} = {value}" for key, value in dotted(changes)),
    }


def _document(sweep: Sweep, findings: Findings, missing: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": sweep.file.name,
        "title": sweep.file.title,
        "env_steps": sweep.env_steps,
        "about": _about(sweep),
        "arms": [asdict(arm) for arm in findings.arms],
        "differences": [asdict(it) for it in findings.differences],
        "curves": {
            axis: {arm: [asdict(place) for place in places] for arm, places in curves.items()}
            for axis, curves in (("env_steps", findings.by_steps), ("minutes", findings.by_minutes))
        },
        "runs": {
            cell.name: {
                "arm": cell.arm,
                "seed": cell.seed,
                "command": cell.command,
                "missing": missing.get(cell.name, None if cell.name in findings.complete else "not run yet"),
                "result": None if trial is None else asdict(trial),
            }
            for cell in sweep.cells
            for trial in [findings.trials.get(cell.arm, {}).get(cell.seed)]
        },
    }


def _finite(value: Any) -> Any:
    """The same without numbers that JSON has no word for: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
