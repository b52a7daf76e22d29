"""Two evaluations, or two runs, side by side: `deskrl compare`. The statistics are pure; reads folders beside them.

Tasks that both have played are paired: what is told is the mean over them of the difference of their success rates,
with an interval over tasks. One task alone, and tasks of which none is shared, are two rates with Newcombe's interval.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deskrl.core.config import read_resolved
from deskrl.core.errors import UserError
from deskrl.core.evaluation.record import TaskRecord, read_records
from deskrl.core.evaluation.sets import evaluation_name, set_folders
from deskrl.core.evaluation.summary import success_rate
from deskrl.core.evaluation.training import TrainedRun, read_run
from deskrl.core.report.history import Count
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.begun import changed_keys, has_learnt
from deskrl.core.stats import newcombe_difference
from deskrl.core.terminal import table_console

_NUM_DRAWS = 2000
_OWN_KEYS = ("name", "runs", "replay.address", "inference.address")

TaskCounts = Mapping[str, Count]
Parts = dict[str, tuple[TaskCounts, TaskCounts]]
"""What is compared, by its name: tasks on both sides."""


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


def compare_counts(a: TaskCounts, b: TaskCounts) -> Comparison:
    """The difference in success, B minus A."""
    rates_a, rates_b = (
        {task: rate for task, count in counts.items() if (rate := count.rate) is not None} for counts in (a, b)
    )
    shared = [task for task in rates_a if task in rates_b]
    differences = [rates_b[task] - rates_a[task] for task in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if len(shared) > 1:
        low, high = _interval(differences)
        return Comparison(len(shared), better, worse, fmean(differences), low, high)
    one, other = (sum([counts[task] for task in shared] or counts.values(), Count(0, 0)) for counts in (a, b))
    difference, low, high = newcombe_difference(one.successes, one.n, other.successes, other.n)
    return Comparison(len(shared), better, worse, difference, low, high)


def counts_of(records: Sequence[TaskRecord], success_above: float) -> dict[str, Count]:
    """Episodes that ended, and successes among them, by task."""
    rates = {record.task_id: success_rate([record], success_above) for record in records}
    return {task: Count(rate.num_successes, rate.num_episodes) for task, rate in rates.items()}


def main(root_a: Path, root_b: Path, *, as_document: bool = False) -> int:
    """Print the comparison of two evaluations' folders, or of two runs'; returns the exit status.

    Raises:
        UserError: one is neither, or one is a run and the other an evaluation.
    """
    is_run = [has_learnt(RunFolder(root)) for root in (root_a, root_b)]  # an evaluation has no learner
    if is_run[0] != is_run[1]:
        run, evaluation = (root_a, root_b) if is_run[0] else (root_b, root_a)
        raise UserError(f"{run} is a run and {evaluation} an evaluation", "name two runs, or two evaluations")
    parts, remarks = _of_runs(root_a, root_b) if is_run[0] else (_of_evaluations(root_a, root_b), [])
    if as_document:
        document = {name: vars(compare_counts(*of)) for name, of in parts.items() if of[0] and of[1]}
        print(json.dumps(document, indent=2))
        return 0
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # names and counts fit into 80 columns
    table.add_column("", no_wrap=True)
    for root in (root_a, root_b):
        table.add_column(evaluation_name(root), overflow="fold", min_width=len("999/999"))
    for header in ("difference", "95 %", "better", "worse", "paired tasks"):
        table.add_column(header, overflow="fold", no_wrap=header == "95 %")
    for name, (of_a, of_b) in parts.items():
        if of_a and of_b:
            table.add_row(name, *_row(of_a, of_b))
    console = table_console()
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False, markup=False)
    return 0


def _of_evaluations(root_a: Path, root_b: Path) -> Parts:
    """One set with one, or each set that both have played."""
    sets_a, sets_b = set_folders(root_a), set_folders(root_b)
    if not sets_a and not sets_b:
        return _of_sets(root_a, root_b)
    shared = [name for name in sets_a if name in sets_b]
    if not shared:
        several = next(root for root, sets in ((root_a, sets_a), (root_b, sets_b)) if sets)
        folders = ", ".join(map(str, set_folders(several).values()))
        raise UserError(f"{root_a} and {root_b} have no set of tasks in common", f"name one of {folders}")
    return {
        f"{name}: {part}": counts for name in shared for part, counts in _of_sets(sets_a[name], sets_b[name]).items()
    }


def _of_sets(root_a: Path, root_b: Path) -> Parts:
    """All tasks, those that are feasible, and application by application."""
    a, b = read_records(root_a), read_records(root_b)
    above = read_resolved(RunFolder(root_b).config).replay.success_above
    parts: Parts = {
        "all": (counts_of(a, above), counts_of(b, above)),
        "feasible": (
            counts_of([r for r in a if not r.infeasible], above),
            counts_of([r for r in b if not r.infeasible], above),
        ),
    }
    for name in sorted({record.application for record in (*a, *b)}):
        of_a, of_b = ([r for r in records if r.application == name] for records in (a, b))
        parts[name] = (counts_of(of_a, above), counts_of(of_b, above))
    return parts


def _of_runs(root_a: Path, root_b: Path) -> tuple[Parts, list[str]]:
    """Training at equal environment steps, its last quarter, evaluations, task by task; and what else is to be told."""
    a, b = read_run(root_a), read_run(root_b)
    steps = min(a.num_env_steps, b.num_env_steps)
    parts: Parts = {
        "training": (a.counts_between(0, steps), b.counts_between(0, steps)),
        "last quarter": (a.counts_between(0.75 * steps, steps), b.counts_between(0.75 * steps, steps)),
    }
    for when in ("before", "after"):
        parts[f"eval {when}"] = (a.evaluations.get(when, {}), b.evaluations.get(when, {}))
    trained_a, trained_b = parts["training"]
    for task in trained_a:
        if task in trained_b:
            parts[f"  {task}"] = ({task: trained_a[task]}, {task: trained_b[task]})
    changed = [key for key in changed_keys(a.config, b.config) if key not in _OWN_KEYS]
    told = ", ".join(changed) if changed else "nothing"
    equal = f"training: the first {steps} environment steps of each"
    return parts, [equal, _pace(root_a, a), _pace(root_b, b), f"configured differently: {told}"]


def _pace(root: Path, run: TrainedRun) -> str:
    return (
        f"{root.name}: {len(run.updates)} updates, {run.num_env_steps} environment steps "
        f"in {run.training_s / 60:.1f} min of training"
    )


def _row(a: TaskCounts, b: TaskCounts) -> list[str]:
    compared = compare_counts(a, b)
    told = [sum(counts.values(), Count(0, 0)) for counts in (a, b)]
    return [
        *(f"{count.successes}/{count.n}" for count in told),
        f"{compared.difference:+.0%}",
        f"[{compared.low:+.0%}, {compared.high:+.0%}]",
        *((str(compared.num_better), str(compared.num_worse)) if compared.paired else ("–", "–")),
        str(compared.num_paired),
    ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean over tasks, by drawing tasks anew; the same for the same values."""
    drawn = random.Random(0)
    means = sorted(fmean(drawn.choices(values, k=len(values))) for _ in range(_NUM_DRAWS))
    return means[int(0.025 * _NUM_DRAWS)], means[int(0.975 * _NUM_DRAWS) - 1]
