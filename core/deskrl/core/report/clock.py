"""Where a run's time went, as its report shows it: by phase, by part of an update, by part of a turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.core.report.history import History, PhaseSpan, Record, number
from deskrl.core.timings import PARTS


@dataclass(frozen=True)
class PhaseRow:
    """One phase in the timeline: where it lies in the run, in shares of the whole."""

    name: str
    total_s: float
    share: float
    spans: list[tuple[float, float]]
    """(start, length) of each stretch."""


def phase_rows(spans: Sequence[PhaseSpan], duration_s: float) -> list[PhaseRow]:
    """Phases in the order in which they began; stretches of a resumed run stay apart on one row."""
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


def update_seconds(history: History) -> list[tuple[str, float]]:
    """Mean seconds of the parts of an update, largest first: each number of its records that is named `*_s`."""
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


def turn_timings(history: History) -> list[tuple[str, float, float]]:
    """By part of a turn, its median and 90th percentile within an update in ms, both as means over the updates."""
    rows = []
    for part, title in PARTS.items():
        spreads = [spread for record in history.updates if (spread := _spread(record, part)) is not None]
        if spreads:
            medians, tails = zip(*spreads, strict=True)
            rows.append((title, sum(medians) / len(spreads), sum(tails) / len(spreads)))
    return rows


def _spread(record: Record, part: str) -> tuple[float, float] | None:
    timings = record.get("timings_ms")
    spread = timings.get(part) if isinstance(timings, dict) else None
    if not isinstance(spread, dict):
        return None
    median, tail = number(spread, "median"), number(spread, "p90")
    return None if median is None or tail is None else (median, tail)
