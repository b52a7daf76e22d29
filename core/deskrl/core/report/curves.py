"""Which curves a report shows, and how each is scaled. Knows the learner's metric names; draws nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.core.report.charts import Chart, Line, Whisker, line_chart, running_mean
from deskrl.core.report.history import History, Points, Record, curve, task_counts

WINDOW = 5
"""Updates in the running mean of success, whose single values rest on few episodes."""


@dataclass(frozen=True)
class Curves:
    """All charts of a report."""

    success: Chart
    tasks: list[Chart]
    learning: list[Chart]
    imitation: list[Chart]


def draw_curves(history: History) -> Curves:
    """Charts of a run; one without data says so."""
    updates = history.updates
    return Curves(
        success=_success(history),
        tasks=[_task_success(updates, task) for task in _tasks(updates)],
        learning=[
            line_chart("Loss", [Line(curve(updates, "loss"))]),
            line_chart("Entropy", [Line(curve(updates, "entropy"))], unit="nats per token", y_from=0),
            line_chart("Gradient norm", [Line(curve(updates, "gradient_norm"))], unit="before clipping", y_from=0),
            line_chart("Staleness", _mean_and_max(updates, "staleness"), unit="versions", y_from=0),
            line_chart("Mismatch at lag 0", _mean_and_max(updates, "mismatch"), unit="|Δ logprob|", log=True),
            line_chart("Clipped tokens", [Line(curve(updates, "clip_fraction"))], unit="share", y_from=0),
        ],
        imitation=[
            line_chart("Imitation loss", [Line(curve(history.imitation, "loss"))], unit="nats", y_from=0),
            line_chart("Likelihood of a demonstration", [Line(curve(history.imitation, "likelihood"))], percent=True),
        ]
        if history.imitation
        else [],
    )


def _success(history: History) -> Chart:
    """Training success, between the evaluations before and after."""
    points = curve(history.updates, "success_rate")
    first, last = (points[0][0], points[-1][0]) if points else (1.0, 1.0)
    room = max(1.0, (last - first) / 25)
    whiskers = []
    for when, x in (("before", first - room), ("after", last + room)):
        evaluation = history.evaluations.get(when)
        if evaluation and (rate := evaluation.overall.rate) is not None:
            low, high = evaluation.overall.interval
            whiskers.append(Whisker(x, rate, low, high, when, hollow=when == "before"))
    title = "Success rate over updates"
    lines = _smoothed(points)
    return line_chart(title, lines, percent=True, whiskers=whiskers, width=560, height=300)


def _smoothed(points: Points) -> list[Line]:
    return [Line(running_mean(points, WINDOW)), Line(points, faint=True)]


def _tasks(updates: Sequence[Record]) -> list[str]:
    return sorted({task for record in updates for task in task_counts(record)})


def _task_success(updates: Sequence[Record], task: str) -> Chart:
    counts = [(float(record["update"]), task_counts(record).get(task)) for record in updates]
    points: Points = [(update, count.rate if count else None) for update, count in counts]
    return line_chart(task, _smoothed(points), percent=True, height=160)


def _mean_and_max(updates: Sequence[Record], name: str) -> list[Line]:
    return [Line(curve(updates, f"{name}_mean"), "mean"), Line(curve(updates, f"{name}_max"), "max", faint=True)]
