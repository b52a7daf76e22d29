"""Two evaluations side by side: `deskrl compare`. The statistics are pure; knows folders only to read records.

Tasks that both have played are paired: what is told is the mean over them of the difference of their success rates,
with an interval over tasks. Where they share none, the difference of the two rates by themselves, with Newcombe's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from deskrl.core.config import read_resolved
from deskrl.core.evaluation.record import TaskRecord, read_records
from deskrl.core.evaluation.summary import success_rate
from deskrl.core.runfolder import RunFolder
from deskrl.core.stats import newcombe_difference

_NUM_DRAWS = 2000


@dataclass(frozen=True)
class Comparison:
    """B minus A."""

    num_paired: int
    num_better: int
    num_worse: int
    difference: float
    low: float
    high: float

    @property
    def paired(self) -> bool:
        """Whether it is over tasks that both have played."""
        return self.num_paired > 0


def compare_records(a: Sequence[TaskRecord], b: Sequence[TaskRecord], success_above: float) -> Comparison:
    """The difference in success, B minus A."""
    rates_a, rates_b = (_task_rates(records, success_above) for records in (a, b))
    shared = [name for name in rates_a if name in rates_b]
    if shared:
        differences = [rates_b[name] - rates_a[name] for name in shared]
        low, high = _interval(differences)
        better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        return Comparison(len(shared), better, worse, fmean(differences), low, high)
    one, other = success_rate(a, success_above), success_rate(b, success_above)
    counts = (one.num_successes, one.num_episodes, other.num_successes, other.num_episodes)
    difference, low, high = newcombe_difference(*counts)
    return Comparison(0, 0, 0, difference, low, high)


def _task_rates(records: Sequence[TaskRecord], success_above: float) -> dict[str, float]:
    """Success rates of tasks of which an episode ended."""
    rates = {record.task_id: success_rate([record], success_above).rate for record in records}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean over tasks, by drawing tasks anew; the same for the same values."""
    drawn = random.Random(0)
    means = sorted(fmean(drawn.choices(values, k=len(values))) for _ in range(_NUM_DRAWS))
    return means[int(0.025 * _NUM_DRAWS)], means[int(0.975 * _NUM_DRAWS) - 1]


def main(root_a: Path, root_b: Path, *, as_document: bool = False) -> int:
    """Print the comparison of two evaluations' folders, application by application; returns the exit status."""
    a, b = read_records(root_a), read_records(root_b)
    above = read_resolved(RunFolder(root_b).config).replay.success_above
    applications = sorted({record.application for record in (*a, *b)})
    parts: dict[str, tuple[list[TaskRecord], list[TaskRecord]]] = {
        "all": (a, b),
        "feasible": tuple([record for record in of if not record.infeasible] for of in (a, b)),  # type: ignore[dict-item]
    }
    for name in applications:
        parts[name] = ([r for r in a if r.application == name], [r for r in b if r.application == name])
    if as_document:
        document = {name: vars(compare_records(*of, above)) for name, of in parts.items() if of[0] and of[1]}
        print(json.dumps(document, indent=2))
        return 0
    table = Table("", root_a.name, root_b.name, "difference", "95 %", "better", "worse", "paired tasks")
    for name, (of_a, of_b) in parts.items():
        if of_a and of_b:
            table.add_row(name, *_row(of_a, of_b, above))
    Console().print(table)
    return 0


def _row(a: Sequence[TaskRecord], b: Sequence[TaskRecord], above: float) -> list[str]:
    compared = compare_records(a, b, above)
    told = [success_rate(records, above) for records in (a, b)]
    return [
        *(f"{rate.num_successes}/{rate.num_episodes}" for rate in told),
        f"{compared.difference:+.0%}",
        f"[{compared.low:+.0%}, {compared.high:+.0%}]",
        *((str(compared.num_better), str(compared.num_worse)) if compared.paired else ("–", "–")),
        str(compared.num_paired),
    ]
