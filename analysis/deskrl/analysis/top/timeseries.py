"""Rates, quantiles and sums over the recent scrapes of several processes.

The same as `rate`, `histogram_quantile` and `sum` of Prometheus, over the scrapes of the last minute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WINDOW_S = 60.0
"""Maximum age of a scrape, in seconds."""

Labels = tuple[tuple[str, str], ...]
"""Label names and values, sorted by name."""
Scrape = Mapping[tuple[str, Labels], float]
"""Samples of one process, by name and labels."""


@dataclass(frozen=True)
class _TimedScrape:
    at_s: float
    scrapes: Mapping[str, Scrape]
    """Scrapes by process."""


class ScrapeWindow:
    """Scrapes of the last minute."""

    def __init__(self) -> None:
        self._scrapes: list[_TimedScrape] = []

    def add(self, at_s: float, scrapes: Mapping[str, Scrape]) -> None:
        """Add the scrapes of all reachable processes, and remove those older than WINDOW_S."""
        kept = [scrape for scrape in self._scrapes if scrape.at_s >= at_s - WINDOW_S]
        self._scrapes = [*kept, _TimedScrape(at_s, scrapes)]

    def values(self, name: str, **labels: str) -> list[float]:
        """Return the latest value of each series with these labels."""
        if not self._scrapes:
            return []
        scrapes = self._scrapes[-1].scrapes.values()
        return [value for scrape in scrapes for found, value in _series(scrape, name, labels) if not math.isnan(value)]

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of `values`; None if there are none."""
        values = self.values(name, **labels)
        return sum(values) if values else None

    def total_by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of `values` by the values of a label."""
        return {value: self.total(name, **{label: value}) or 0.0 for value in self._label_values(name, label)}

    def rate(self, name: str, **labels: str) -> float | None:
        """Return the increase per second over all processes; None before the second scrape.

        A counter that decreased was restarted and counts from 0.
        """
        seen = [increase / length_s for increase, length_s in self._increases(name, labels) if length_s > 0]
        return sum(seen) if seen else None

    def rate_by(self, name: str, label: str) -> dict[str, float]:
        """Return the increases per second by the values of a label, without those that are 0."""
        rates = {value: self.rate(name, **{label: value}) for value in self._label_values(name, label)}
        return {value: rate for value, rate in rates.items() if rate}

    def increase(self, name: str, **labels: str) -> float | None:
        """Return the increase over the window; None before the second scrape."""
        seen = [increase for increase, length_s in self._increases(name, labels) if length_s > 0]
        return sum(seen) if seen else None

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Return a quantile of a histogram's observations in the window; None without observations."""
        buckets = {
            float(bound): self.increase(f"{name}_bucket", le=bound, **labels) or 0.0
            for bound in self._label_values(f"{name}_bucket", "le")
        }
        return quantile_of(share, buckets)

    def mean(self, name: str, **labels: str) -> float | None:
        """Return the mean of a histogram's observations in the window; None without observations."""
        number = self.increase(f"{name}_count", **labels)
        return (self.increase(f"{name}_sum", **labels) or 0.0) / number if number else None

    def _increases(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[float, float]]:
        """Yield increase and period in seconds of each series in the latest scrape."""
        if not self._scrapes:
            return
        last = self._scrapes[-1]
        for process, scrape in last.scrapes.items():
            for key, _ in _series(scrape, name, labels):
                seen = [
                    (it.at_s, it.scrapes[process][key]) for it in self._scrapes if key in it.scrapes.get(process, ())
                ]
                steps = itertools.pairwise(value for _, value in seen)
                increase = sum(new - old if new >= old else new for old, new in steps)
                yield increase, seen[-1][0] - seen[0][0]

    def _label_values(self, name: str, label: str) -> list[str]:
        found: dict[str, None] = {}
        for scrape in self._scrapes[-1].scrapes.values() if self._scrapes else ():
            for sample, labels in scrape:
                if sample == name and label in dict(labels):
                    found[dict(labels)[label]] = None
        return list(found)


def quantile_of(share: float, buckets: Mapping[float, float]) -> float | None:
    """Return the quantile of cumulative buckets, given by upper bound, with the interpolation of Prometheus."""
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
