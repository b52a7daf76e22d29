"""Charts of a report, laid out from the records of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.analysis.report.charts import Chart, Line, Whisker, line_chart, running_mean
from deskrl.analysis.report.run_history import Points, Record, RunHistory, curve, task_counts

SMOOTHING_UPDATES = 5
"""Number of updates in the running mean of the success rate; a single update has few episodes."""


@dataclass(frozen=True)
class RunCharts:
    """All charts of a report."""

    success: Chart
    tasks: list[Chart]
    learning: list[Chart]
    imitation: list[Chart]


def build_run_charts(history: RunHistory) -> RunCharts:
    """Lay out all charts of a run; a chart without data is empty."""
    updates = history.updates
    return RunCharts(
        success=_success(history),
        tasks=[_task_success(updates, task) for task in _tasks(updates)],
        learning=[
            line_chart("Loss", [Line(curve(updates, "loss"))]),
            line_chart("Entropy", [Line(curve(updates, "entropy"))], unit="nats per token", y_from=0),
            *_kl(updates),
            line_chart("Gradient norm", [Line(curve(updates, "gradient_norm"))], unit="before clipping", y_from=0),
            line_chart(
                "Staleness",
                [Line(curve(updates, "staleness_mean"), "mean"), Line(curve(updates, "staleness_max"), "max", True)],
                unit="versions",
                y_from=0,
            ),
            line_chart("Logprob mismatch at lag 0", _mismatch(history), unit="|Δ logprob|", log=True),
            line_chart("Clipped tokens", [Line(curve(updates, "clip_fraction"))], unit="share", y_from=0),
        ],
        imitation=[
            line_chart(
                "Imitation loss", [Line(curve(history.imitation, "loss"))], unit="nats", y_from=0, width=560, height=200
            ),
            # Logarithmic, because the product over all tokens of an episode starts near zero and grows by factors.
            line_chart("Likelihood of a demonstrated episode", _likelihood(history), log=True, width=560, height=200),
        ]
        if history.imitation
        else [],
    )


def _kl(updates: Sequence[Record]) -> list[Chart]:
    """Lay out the KL divergence from the reference policy, for a run with a KL penalty."""
    points = curve(updates, "kl")
    if all(value is None for _, value in points):
        return []
    return [line_chart("KL from the reference", [Line(points)], unit="nats per token")]


def _success(history: RunHistory) -> Chart:
    """Lay out the success rate in training, with the evaluations before and after at both ends."""
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
    return [Line(running_mean(points, SMOOTHING_UPDATES)), Line(points, faint=True)]


def _tasks(updates: Sequence[Record]) -> list[str]:
    return sorted({task for record in updates for task in task_counts(record)})


def _task_success(updates: Sequence[Record], task: str) -> Chart:
    counts = [(float(record["update"]), task_counts(record).get(task)) for record in updates]
    points: Points = [(update, count.rate if count else None) for update, count in counts]
    return line_chart(task, _smoothed(points), percent=True, width=240, height=150)


def _mismatch(history: RunHistory) -> list[Line]:
    """Return mean and maximum over updates, preceded and followed by those of the evaluations, which have lag 0."""
    mean, largest = curve(history.updates, "mismatch_mean"), curve(history.updates, "mismatch_max")
    first, last = _ends(mean)
    for when, place, x in (("before", 0, first - 1), ("after", len(mean) + 1, last + 1)):
        if evaluation := history.evaluations.get(when):
            mean.insert(place, (x, evaluation.mismatch_mean))
            largest.insert(place, (x, evaluation.mismatch_max))
    return [Line(mean, "mean"), Line(largest, "max", faint=True)]


def _likelihood(history: RunHistory) -> list[Line]:
    """Return the likelihood over updates; it is measured every few updates, so gaps are closed."""
    return [Line([point for point in curve(history.imitation, "likelihood") if point[1] is not None])]


def _ends(points: Points) -> tuple[float, float]:
    """Return the first and the last x."""
    return (points[0][0], points[-1][0]) if points else (1.0, 1.0)
