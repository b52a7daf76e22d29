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
            line_chart(
                "Staleness",
                [Line(curve(updates, "staleness_mean"), "mean"), Line(curve(updates, "staleness_max"), "max", True)],
                unit="versions",
                y_from=0,
            ),
            line_chart("Mismatch at lag 0", _mismatch(history), unit="|Δ logprob|", log=True),
            line_chart("Clipped tokens", [Line(curve(updates, "clip_fraction"))], unit="share", y_from=0),
        ],
        imitation=[
            line_chart(
                "Imitation loss", [Line(curve(history.imitation, "loss"))], unit="nats", y_from=0, width=560, height=200
            ),
            # Logarithmic: a product over all of an episode's tokens starts next to nothing and grows by factors.
            line_chart("Likelihood of a demonstrated episode", _likelihood(history), log=True, width=560, height=200),
        ]
        if history.imitation
        else [],
    )


def _success(history: History) -> Chart:
    """Training success, between the evaluations before and after."""
    points = curve(history.updates, "success_rate")
    first, last = _ends(points)
    room = max(1.0, (last - first) / 40)
    whiskers = []
    for when, x in (("before", first - room), ("after", last + room)):
        evaluation = history.evaluations.get(when)
        if evaluation and (rate := evaluation.overall.rate) is not None:
            low, high = evaluation.overall.interval
            whiskers.append(Whisker(x, rate, low, high, when, hollow=when == "before"))
    title = "Success rate over updates"
    lines = _smoothed(points)
    return line_chart(title, lines, percent=True, whiskers=whiskers, width=560, height=350)


def _smoothed(points: Points) -> list[Line]:
    return [Line(running_mean(points, WINDOW)), Line(points, faint=True)]


def _tasks(updates: Sequence[Record]) -> list[str]:
    return sorted({task for record in updates for task in task_counts(record)})


def _task_success(updates: Sequence[Record], task: str) -> Chart:
    counts = [(float(record["update"]), task_counts(record).get(task)) for record in updates]
    points: Points = [(update, count.rate if count else None) for update, count in counts]
    return line_chart(task, _smoothed(points), percent=True, width=240, height=150)


def _mismatch(history: History) -> list[Line]:
    """Over updates, and at both ends in the evaluations, which always act at the learner's version."""
    mean, largest = curve(history.updates, "mismatch_mean"), curve(history.updates, "mismatch_max")
    first, last = _ends(mean)
    for when, place, x in (("before", 0, first - 1), ("after", len(mean) + 1, last + 1)):
        if evaluation := history.evaluations.get(when):
            mean.insert(place, (x, evaluation.mismatch_mean))
            largest.insert(place, (x, evaluation.mismatch_max))
    return [Line(mean, "mean"), Line(largest, "max", faint=True)]


def _likelihood(history: History) -> list[Line]:
    """Measured every few updates only, so that the measured ones are joined."""
    return [Line([point for point in curve(history.imitation, "likelihood") if point[1] is not None])]


def _ends(points: Points) -> tuple[float, float]:
    """First and last update."""
    return (points[0][0], points[-1][0]) if points else (1.0, 1.0)
