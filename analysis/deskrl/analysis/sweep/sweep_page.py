"""Report of a sweep: a self-contained `sweep.html`, `sweep.json` beside it, and a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from deskrl.actor.desktops.provider_registry import describe_added_delays
from deskrl.analysis.report.charts import Band, Chart, Line, line_chart
from deskrl.analysis.report.run_history import read_history
from deskrl.analysis.report.templating import read_asset, template_environment
from deskrl.analysis.sweep.arm_comparison import (
    ArmDifference,
    ArmResult,
    MeanInterval,
    RunResult,
    compare_arms,
    summarise_run,
)
from deskrl.analysis.sweep.success_curves import WINDOW_SHARE, CurvePoint, curve_by_minutes, curve_by_steps
from deskrl.analysis.sweep.sweep_config import START, Sweep, SweepRun
from deskrl.analysis.sweep.sweep_runner import is_complete, shortfall
from deskrl.core.config import dotted
from deskrl.core.console import table_console
from deskrl.core.file_io import write_atomically, write_json

_NUM_COLOURS = 4
_STATISTIC_LABELS = {"groups without spread": "zero-variance groups", "stored successes used": "success buffer hits"}
"""Labels on the page of those statistics whose key in sweep.json does not suit as one."""


@dataclass(frozen=True)
class SweepResults:
    """Results of the complete runs of a sweep."""

    complete: frozenset[str]
    """Names of the complete runs."""
    by_run: dict[str, dict[int, RunResult]]
    """Results by arm and seed."""
    short: dict[str, str]
    """Reasons and remedies of runs that ended before their last environment step, by name."""
    arms: list[ArmResult]
    differences: list[ArmDifference]
    curve_by_steps: dict[str, list[CurvePoint]]
    curve_by_minutes: dict[str, list[CurvePoint]]


def read_results(sweep: Sweep) -> SweepResults:
    """Read and compare the complete runs."""
    by_run: dict[str, dict[int, RunResult]] = {arm: {} for arm in sweep.file.arms}
    short: dict[str, str] = {}
    complete = frozenset(run.name for run in sweep.runs if is_complete(run))
    for run in sweep.runs:
        if run.arm == START or run.name not in complete:
            continue
        if reason := shortfall(run, sweep.env_steps):
            short[run.name] = reason
        else:
            by_run[run.arm][run.seed] = summarise_run(read_history(run.run_dir).updates, sweep.env_steps)
    arms, differences = compare_arms(by_run)
    progress = {arm: [result.learning for result in by_seed.values()] for arm, by_seed in by_run.items() if by_seed}
    return SweepResults(
        complete,
        by_run,
        short,
        arms,
        differences,
        {arm: curve_by_steps(of_arm, sweep.env_steps) for arm, of_arm in progress.items()},
        {arm: curve_by_minutes(of_arm, sweep.env_steps) for arm, of_arm in progress.items()},
    )


def write_page(sweep: Sweep, results: SweepResults, missing: Mapping[str, str]) -> None:
    """Write `sweep.html` and `sweep.json`.

    Args:
        sweep: the sweep.
        results: results of its complete runs.
        missing: reasons of runs that are not complete, by name; runs without a reason have not been run yet.
    """
    missing = {**missing, **results.short}
    write_json(sweep.root / "sweep.json", _finite(_document(sweep, results, missing)))
    environment = template_environment()
    series = {arm: number % _NUM_COLOURS for number, arm in enumerate(sweep.file.arms)}
    html = environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        about=_about(sweep),
        window=round(WINDOW_SHARE * sweep.env_steps),
        results=results.arms,
        differences=results.differences,
        charts=_charts(results, series),
        series=series,
        rows=[_row(run, sweep, results, missing) for run in sweep.runs],
        num_missing=len(sweep.runs) - len(results.complete - results.short.keys()),
        statistic_labels=_STATISTIC_LABELS,
        level=level_text,
        change=change_text,
        ratio=ratio_text,
        minutes=minutes_text,
        style=read_asset(environment, "report.css"),
    )
    write_atomically(sweep.root / "sweep.html", html.encode())


def print_results(sweep: Sweep, results: SweepResults) -> None:
    """Print the comparison to the terminal."""
    console = table_console()
    arms = Table(title=f"{sweep.file.name}, {sweep.env_steps} environment steps per run", title_justify="left")
    for column in ("arm", "seeds", "success", "last quarter", "minutes"):
        arms.add_column(column)
    for arm in results.arms:
        row = (level_text(arm.success), level_text(arm.last_success), minutes_text(arm.minutes))
        arms.add_row(arm.arm, str(arm.num_seeds), *row)
    console.print(arms)
    if results.differences:
        table = Table()
        for column in ("difference", "seeds", "success", "last quarter", "wall clock"):
            table.add_column(column)
        for it in results.differences:
            row = (change_text(it.success), change_text(it.last_success), ratio_text(it.minutes_ratio))
            table.add_row(f"{it.arm} - {it.against}", str(it.num_seeds), *row)
        console.print(table)
        console.print("means over seeds, [95 % intervals by Student's t]", highlight=False, markup=False)
    console.print(f"report: {sweep.root / 'sweep.html'}", highlight=False, soft_wrap=True)


def level_text(it: MeanInterval) -> str:
    """Format a success rate: 61% [52%, 70%]."""
    ends = f" [{max(0.0, it.low):.0%}, {min(1.0, it.high):.0%}]" if it.is_finite else ""
    return f"{it.mean:.0%}{ends}"


def change_text(it: MeanInterval) -> str:
    """Format a difference of success rates: +12 points [-3, +27]."""
    ends = f" [{100 * it.low:+.0f}, {100 * it.high:+.0f}]" if it.is_finite else ""
    return f"{100 * it.mean:+.0f} points{ends}"


def ratio_text(it: MeanInterval) -> str:
    """Format a ratio: x 0.45 [0.40, 0.51]."""
    ends = f" [{it.low:.2f}, {it.high:.2f}]" if it.low > 0 else ""
    return f"x {it.mean:.2f}{ends}"


def minutes_text(it: MeanInterval) -> str:
    """Format minutes: 3.4 [3.1, 3.7]."""
    ends = f" [{max(0.0, it.low):.1f}, {it.high:.1f}]" if it.is_finite else ""
    return f"{it.mean:.1f}{ends}"


def _about(sweep: Sweep) -> list[str]:
    """Describe the desktops of the experiment."""
    config = next(run.config for run in sweep.runs if run.arm != START)
    lines = [f"{config.desktop.num_envs} {config.desktop.provider} desktops"]
    if delays := describe_added_delays(config.desktop):
        lines.append(f"added delays: {delays}")
    return lines


def _charts(results: SweepResults, series: Mapping[str, int]) -> list[Chart]:
    charts = (
        ("Success against environment steps", "environment steps", results.curve_by_steps),
        ("Success against wall clock", "minutes of training", results.curve_by_minutes),
    )
    return [_chart(title, x_title, curves, series) for title, x_title, curves in charts]


def _chart(title: str, x_title: str, curves: Mapping[str, list[CurvePoint]], series: Mapping[str, int]) -> Chart:
    lines, bands = [], []
    for arm, points in curves.items():
        lines.append(Line([(0.0, None), *((point.x, point.mean) for point in points)], series=series[arm]))
        bands.append(Band([(point.x, point.low, point.high) for point in points if point.has_interval], series[arm]))
    return line_chart(title, lines, x_title=x_title, percent=True, bands=bands, width=560, height=350)


def _row(run: SweepRun, sweep: Sweep, results: SweepResults, missing: Mapping[str, str]) -> dict[str, Any]:
    changes = sweep.file.arms.get(run.arm, {})
    is_done = run.name in results.complete
    return {
        "name": run.name,
        "is_start": run.arm == START and is_done,
        "trial": results.by_run.get(run.arm, {}).get(run.seed),
        "why": missing.get(run.name, "the warm start of this seed" if is_done else "not run yet"),
        "changes": ", ".join(f"{key} = {value}" for key, value in dotted(changes)),
    }


def _document(sweep: Sweep, results: SweepResults, missing: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": sweep.file.name,
        "title": sweep.file.title,
        "env_steps": sweep.env_steps,
        "about": _about(sweep),
        "arms": [asdict(arm) for arm in results.arms],
        "differences": [asdict(it) for it in results.differences],
        "curves": {
            axis: {arm: [asdict(point) for point in points] for arm, points in curves.items()}
            for axis, curves in (("env_steps", results.curve_by_steps), ("minutes", results.curve_by_minutes))
        },
        "runs": {
            run.name: {
                "arm": run.arm,
                "seed": run.seed,
                "command": run.command,
                "missing": missing.get(run.name, None if run.name in results.complete else "not run yet"),
                "result": None if trial is None else asdict(trial),
            }
            for run in sweep.runs
            for trial in [results.by_run.get(run.arm, {}).get(run.seed)]
        },
    }


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
