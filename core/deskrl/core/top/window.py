"""Rates, quantiles and sums over the last scrapes of several processes. Pure: knows numbers, no port and no metric.

What Prometheus computes with `rate`, `histogram_quantile` and `sum`, over a window that is as long as what was seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WINDOW_S = 60.0

Labels = tuple[tuple[str, str], ...]
"""In order of their names."""
Scrape = Mapping[tuple[str, Labels], float]
"""Samples of one process by name and labels."""


@dataclass(frozen=True)
class _Moment:
    at_s: float
    scrapes: Mapping[str, Scrape]
    """By process."""


class Window:
    """The scrapes of the last minute."""

    def __init__(self) -> None:
        self._moments: list[_Moment] = []

    def add(self, at_s: float, scrapes: Mapping[str, Scrape]) -> None:
        """Take over a scrape of all processes that answered, and forget those that are too old."""
        kept = [moment for moment in self._moments if moment.at_s >= at_s - WINDOW_S]
        self._moments = [*kept, _Moment(at_s, scrapes)]

    def values(self, name: str, **labels: str) -> list[float]:
        """What each process last said, each of its series that has these labels."""
        if not self._moments:
            return []
        scrapes = self._moments[-1].scrapes.values()
        return [value for scrape in scrapes for found, value in _series(scrape, name, labels) if not math.isnan(value)]

    def total(self, name: str, **labels: str) -> float | None:
        """Their sum; None if there are none."""
        values = self.values(name, **labels)
        return sum(values) if values else None

    def total_by(self, name: str, label: str) -> dict[str, float]:
        """Their sums by the values of a label."""
        return {value: self.total(name, **{label: value}) or 0.0 for value in self._label_values(name, label)}

    def rate(self, name: str, **labels: str) -> float | None:
        """Increase a second over all processes; None before anything was seen twice. A restart counts from 0."""
        seen = [increase / length_s for increase, length_s in self._increases(name, labels) if length_s > 0]
        return sum(seen) if seen else None

    def rate_by(self, name: str, label: str) -> dict[str, float]:
        """Increases a second by the values of a label; those that stand still are left out."""
        rates = {value: self.rate(name, **{label: value}) for value in self._label_values(name, label)}
        return {value: rate for value, rate in rates.items() if rate}

    def increase(self, name: str, **labels: str) -> float | None:
        """How much was added over the window; None before anything was seen twice."""
        seen = [increase for increase, length_s in self._increases(name, labels) if length_s > 0]
        return sum(seen) if seen else None

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """A quantile of what a histogram observed in the window; None if it observed nothing."""
        buckets = {
            float(bound): self.increase(f"{name}_bucket", le=bound, **labels) or 0.0
            for bound in self._label_values(f"{name}_bucket", "le")
        }
        return quantile_of(share, buckets)

    def mean(self, name: str, **labels: str) -> float | None:
        """The mean of what a histogram observed in the window; None if it observed nothing."""
        number = self.increase(f"{name}_count", **labels)
        return (self.increase(f"{name}_sum", **labels) or 0.0) / number if number else None

    def _increases(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[float, float]]:
        """(increase, seconds) of each series of each process that was seen now and before."""
        if not self._moments:
            return
        last = self._moments[-1]
        for process, scrape in last.scrapes.items():
            for key, _ in _series(scrape, name, labels):
                seen = [
                    (it.at_s, it.scrapes[process][key]) for it in self._moments if key in it.scrapes.get(process, ())
                ]
                steps = itertools.pairwise(value for _, value in seen)
                increase = sum(new - old if new >= old else new for old, new in steps)
                yield increase, seen[-1][0] - seen[0][0]

    def _label_values(self, name: str, label: str) -> list[str]:
        found: dict[str, None] = {}
        for scrape in self._moments[-1].scrapes.values() if self._moments else ():
            for sample, labels in scrape:
                if sample == name and label in dict(labels):
                    found[dict(labels)[label]] = None
        return list(found)


def quantile_of(share: float, buckets: Mapping[float, float]) -> float | None:
    """The quantile of cumulative buckets by their upper bounds, interpolated as Prometheus does."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    index = next(index for index, bound in enumerate(bounds) if buckets[bound] >= rank)
    if math.isinf(bounds[index]):
        return bounds[index - 1] if index else None
    low, below = (bounds[index - 1], buckets[bounds[index - 1]]) if index else (0.0, 0.0)
    inside = buckets[bounds[index]] - below
    return bounds[index] if inside <= 0 else low + (bounds[index] - low) * (rank - below) / inside


def _series(scrape: Scrape, name: str, labels: Mapping[str, str]) -> Iterator[tuple[tuple[str, Labels], float]]:
    for key, value in scrape.items():
        if key[0] == name and labels.items() <= dict(key[1]).items():
            yield key, value
