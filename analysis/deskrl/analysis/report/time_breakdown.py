"""Wall-clock time of a run by phase, by part of an update and by part of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.analysis.report.run_history import PhaseSpan, Record, RunHistory, number
from deskrl.core.latency_breakdown import PARTS


@dataclass(frozen=True)
class PhaseRow:
    """One row of the timeline, with positions as shares of the run's duration."""

    name: str
    total_s: float
    share: float
    spans: list[tuple[float, float]]
    """Start and length of each period in this phase."""


def phase_rows(spans: Sequence[PhaseSpan], duration_s: float) -> list[PhaseRow]:
    """Return one row for each phase, in order of first start; a resumed run has several periods on one row."""
    by_name: dict[str, list[PhaseSpan]] = {}
    for span in spans:
        by_name.setdefault(span.phase, []).append(span)
    whole = duration_s or 1.0
    return [
        PhaseRow(
            name.replace("_", " "),
            total := sum(span.end_s - span.start_s for span in parts),
            total / whole,
            [(span.start_s / whole, (span.end_s - span.start_s) / whole) for span in parts],
        )
        for name, parts in by_name.items()
    ]


def mean_update_seconds(history: RunHistory) -> list[tuple[str, float]]:
    """Return the mean seconds of the parts of an update, largest first.

    Parts are the entries of `seconds` in the update's record, and its keys that end in `_s`.
    """
    sums: dict[str, float] = {}
    for record in history.updates:
        nested = record.get("seconds")
        parts = nested if isinstance(nested, dict) else {}
        timed = [(str(key), number(parts, key)) for key in parts]
        timed += [(key, number(record, key)) for key in record if key.endswith("_s") and key != "unix_s"]
        for key, value in timed:
            name = key.removesuffix("_s").lower().replace("_", " ")
            sums[name] = sums.get(name, 0.0) + (value or 0.0)
    means = [(name, total / len(history.updates)) for name, total in sums.items() if total > 0]
    return sorted(means, key=lambda it: -it[1])


def step_timings(history: RunHistory) -> list[tuple[str, float, float]]:
    """Return title, median and 90th percentile (ms) of each part of a step; both are means over the updates."""
    rows = []
    for part, title in PARTS.items():
        percentiles = [found for record in history.updates if (found := _percentiles(record, part)) is not None]
        if percentiles:
            medians, tails = zip(*percentiles, strict=True)
            rows.append((title, sum(medians) / len(percentiles), sum(tails) / len(percentiles)))
    return rows


def _percentiles(record: Record, part: str) -> tuple[float, float] | None:
    timings = record.get("timings_ms")
    found = timings.get(part) if isinstance(timings, dict) else None
    if not isinstance(found, dict):
        return None
    median, tail = number(found, "median"), number(found, "p90")
    return None if median is None or tail is None else (median, tail)
