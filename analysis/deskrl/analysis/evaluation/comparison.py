"""`deskrl compare`: difference in success rate between two evaluations or two runs.

Tasks that both sides have are paired: the difference is the mean over tasks of the difference of their success rates,
with Newcombe's interval for paired proportions over tasks. With fewer than two shared tasks it is the difference of two
proportions with Newcombe's interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deskrl.analysis.evaluation.episode_records import EvaluatedTask, has_evaluation, read_evaluation
from deskrl.analysis.evaluation.summary import success_rate
from deskrl.analysis.evaluation.task_sets import evaluation_name, named_task_sets, task_ids, task_set_dirs
from deskrl.analysis.evaluation.trained_run import TrainedRun, read_trained_run
from deskrl.analysis.report.run_history import Count
from deskrl.core.config import read_resolved
from deskrl.core.console import table_console
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.confidence_intervals import newcombe_difference, paired_difference
from deskrl.launch.run_state import changed_keys, has_started_training, influences_results, is_evaluation

TaskCounts = Mapping[str, Count]
Parts = dict[str, tuple[TaskCounts, TaskCounts]]
"""Counts by task of A and of B, by the name of the compared part."""


@dataclass(frozen=True)
class Comparison:
    """Difference in success rate, B minus A, with its 95 % interval."""

    num_paired: int
    num_better: int
    num_worse: int
    difference: float
    low: float
    high: float

    @property
    def paired(self) -> bool:
        """Whether the difference is over tasks that both sides have."""
        return self.num_paired > 0


def compare_counts(a: TaskCounts, b: TaskCounts) -> Comparison:
    """Return the difference in success rate, B minus A, paired by task if two or more tasks are shared."""
    rates_a, rates_b = (
        {task: rate for task, count in counts.items() if (rate := count.rate) is not None} for counts in (a, b)
    )
    shared = [task for task in rates_a if task in rates_b]
    differences = [rates_b[task] - rates_a[task] for task in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if len(shared) > 1:
        num_episodes = sum(a[task].n for task in shared), sum(b[task].n for task in shared)
        interval = paired_difference(
            [rates_a[task] for task in shared], [rates_b[task] for task in shared], num_episodes
        )
        return Comparison(len(shared), better, worse, *interval)
    total_a, total_b = (sum([counts[task] for task in shared] or counts.values(), Count(0, 0)) for counts in (a, b))
    difference, low, high = newcombe_difference(total_a.successes, total_a.n, total_b.successes, total_b.n)
    return Comparison(len(shared), better, worse, difference, low, high)


def counts_by_task(records: Sequence[EvaluatedTask], success_threshold: float) -> dict[str, Count]:
    """Return successes and finished episodes by task."""
    rates = {record.task_id: success_rate([record], success_threshold) for record in records}
    return {task: Count(rate.num_successes, rate.num_episodes) for task, rate in rates.items()}


def compare(root_a: Path, root_b: Path, *, as_document: bool = False) -> int:
    """Print the comparison of two evaluations or two runs, given by their directories; returns the exit status.

    Raises:
        UserError: a directory is missing or neither of the two, or one is a run and the other an evaluation.
    """
    is_run = [_is_run(root) for root in (root_a, root_b)]
    if is_run[0] != is_run[1]:
        run, evaluation = (root_a, root_b) if is_run[0] else (root_b, root_a)
        raise UserError(f"{run} is a run, but {evaluation} is an evaluation", "name two runs or two evaluations")
    parts, remarks = _run_parts(root_a, root_b) if is_run[0] else _evaluation_parts(root_a, root_b)
    if as_document:
        document = {name: vars(compare_counts(a, b)) for name, (a, b) in parts.items() if a and b}
        print(json.dumps(document, indent=2))
        return 0
    _print_comparison(root_a, root_b, parts, remarks)
    return 0


def _is_run(root: Path) -> bool:
    """Return whether a directory contains a training run; False if it contains an evaluation or one of its task sets.

    Raises:
        UserError: it does not exist, or contains neither.
    """
    if not root.is_dir():
        raise UserError(f"{root}: not found", "name the directory of a run or of an evaluation")
    folder = RunDir(root)
    if is_evaluation(folder) or has_evaluation(root) or any(map(has_evaluation, task_set_dirs(root).values())):
        return False
    if not folder.config.is_file() and not has_started_training(folder):
        raise UserError(f"{root}: contains neither a run nor an evaluation", "name the directory of one of them")
    return True


def _print_comparison(root_a: Path, root_b: Path, parts: Parts, remarks: Sequence[str]) -> None:
    # Narrow enough that names and counts fit into 80 columns.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for root in (root_a, root_b):
        table.add_column(evaluation_name(root), overflow="fold", min_width=len("999/999"))
    for header in ("difference", "95 %", "better", "worse", "paired tasks"):
        table.add_column(header, overflow="fold", no_wrap=header == "95 %")
    for name, (a, b) in parts.items():
        if a and b:
            table.add_row(name, *_row(a, b))
    console = table_console()
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False, markup=False)


def _evaluation_parts(root_a: Path, root_b: Path) -> tuple[Parts, list[str]]:
    """Return the parts of the task sets that two evaluations or task sets share, and remarks on what is left out."""
    sets_a, sets_b = named_task_sets(root_a), named_task_sets(root_b)
    shared = _match_sets(sets_a, sets_b)
    if not shared:
        listed = ", ".join(str(path) for path in (*sets_a.values(), *sets_b.values()))
        raise UserError(
            f"{root_a} and {root_b} have no task set in common, neither by name nor by tasks", f"name two of {listed}"
        )
    parts: Parts = {}
    remarks = []
    for name, (dir_a, dir_b) in shared.items():
        prefix = f"{name}: " if len(shared) > 1 or len(sets_a) > 1 or len(sets_b) > 1 else ""
        of_set = _task_set_parts(dir_a, dir_b)
        parts |= {f"{prefix}{part}": counts for part, counts in of_set.items()}
        remarks += [f"{prefix}{remark}" for remark in _unpaired(*of_set["all"], root_a, root_b)]
    if left_out := [name for name in (*sets_a, *sets_b) if name not in _names(shared, sets_a, sets_b)]:
        remarks.append(f"task sets of one evaluation only, not compared: {', '.join(dict.fromkeys(left_out))}")
    return parts, remarks


def _match_sets(sets_a: Mapping[str, Path], sets_b: Mapping[str, Path]) -> dict[str, tuple[Path, Path]]:
    """Return the task sets to compare by name: those of the same name, then those with the same tasks.

    A single set on either side is compared with a single set on the other, whatever its tasks.
    """
    shared = {name: (sets_a[name], sets_b[name]) for name in sets_a if name in sets_b}
    if len(sets_a) == len(sets_b) == 1:
        return shared or dict(zip(sets_a, zip(sets_a.values(), sets_b.values(), strict=True), strict=True))
    rest = {name: task_ids(path) for name, path in sets_b.items() if name not in shared}
    for name, path in sets_a.items():
        same = next((other for other, ids in rest.items() if ids and ids == task_ids(path)), None)
        if name not in shared and same is not None:
            shared[name] = (path, sets_b[same])
            del rest[same]
    return shared


def _names(shared: Mapping[str, tuple[Path, Path]], sets_a: Mapping[str, Path], sets_b: Mapping[str, Path]) -> set[str]:
    """Return the names, on both sides, of the task sets that are compared."""
    compared = {path for pair in shared.values() for path in pair}
    return {name for sets in (sets_a, sets_b) for name, path in sets.items() if path in compared}


def _unpaired(a: TaskCounts, b: TaskCounts, root_a: Path, root_b: Path) -> list[str]:
    """Return remarks on tasks that one side lacks; these are in its totals, but in no difference."""
    return [
        f"{num} of {len(own)} tasks of {evaluation_name(root)} have no counterpart and are not compared"
        for own, other, root in ((a, b, root_a), (b, a, root_b))
        if (num := sum(not (other.get(task) and other[task].n) for task in own)) and num < len(own)
    ]


def _task_set_parts(root_a: Path, root_b: Path) -> Parts:
    """Return the parts of two task sets: all tasks, feasible tasks, and each application."""
    a, b = read_evaluation(root_a), read_evaluation(root_b)
    threshold = read_resolved(RunDir(root_b).config).replay.success_threshold
    parts: Parts = {
        "all": (counts_by_task(a, threshold), counts_by_task(b, threshold)),
        "feasible": (
            counts_by_task([r for r in a if not r.infeasible], threshold),
            counts_by_task([r for r in b if not r.infeasible], threshold),
        ),
    }
    for name in sorted({record.application for record in (*a, *b)}):
        app_a, app_b = ([r for r in records if r.application == name] for records in (a, b))
        parts[name] = (counts_by_task(app_a, threshold), counts_by_task(app_b, threshold))
    return parts


def _run_parts(root_a: Path, root_b: Path) -> tuple[Parts, list[str]]:
    """Return the parts of two runs at equal environment steps (training, evaluations, tasks), and remarks."""
    a, b = read_trained_run(root_a), read_trained_run(root_b)
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
    others = [key for key in changed_keys(a.config, b.config) if key not in ("name", "runs")]
    changed = [key for key in others if influences_results(key)]
    differing = ", ".join(changed) if changed else "none"
    budget = f"training: the first {steps} environment steps of each"
    return parts, [budget, _totals(root_a, a), _totals(root_b, b), f"different configuration keys: {differing}"]


def _totals(root: Path, run: TrainedRun) -> str:
    return (
        f"{root.name}: {len(run.updates)} updates, {run.num_env_steps} environment steps "
        f"in {run.training_s / 60:.1f} min of training"
    )


def _row(a: TaskCounts, b: TaskCounts) -> list[str]:
    compared = compare_counts(a, b)
    totals = [sum(counts.values(), Count(0, 0)) for counts in (a, b)]
    return [
        *(f"{count.successes}/{count.n}" for count in totals),
        f"{compared.difference:+.0%}",
        f"[{compared.low:+.0%}, {compared.high:+.0%}]",
        *((str(compared.num_better), str(compared.num_worse)) if compared.paired else ("–", "–")),
        str(compared.num_paired),
    ]
