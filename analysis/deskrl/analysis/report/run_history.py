"""Records of a run directory (metrics.jsonl and the result files) as typed values.

Reading never fails: a missing or malformed key is a gap, and a damaged file counts as missing. A resumed run repeats
updates, of which the last record counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core.run_dir import RunDir
from deskrl.launch.confidence_intervals import wilson_interval

Record = Mapping[str, Any]
Points = list[tuple[float, float | None]]
"""Points (x, y) of a curve; y is None where the value is missing or not finite."""


@dataclass(frozen=True)
class Count:
    """Number of successes among episodes."""

    successes: int
    n: int

    def __add__(self, other: Count) -> Count:
        """Return the pooled count."""
        return Count(self.successes + other.successes, self.n + other.n)

    @property
    def rate(self) -> float | None:
        """Share of successes; None without episodes."""
        return self.successes / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the rate."""
        return wilson_interval(self.successes, self.n)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy."""

    overall: Count
    per_task: dict[str, Count]
    mismatch_mean: float | None
    """Mean absolute difference between sampled and recomputed logprobs, in nats."""
    mismatch_max: float | None
    num_faulted: int
    num_other_version: int
    """Number of episodes excluded because another policy version than the evaluated one acted in them."""


@dataclass(frozen=True)
class PhaseSpan:
    """Period that the run spent in one phase, in seconds since its start."""

    phase: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class AcceptanceRow:
    """One acceptance criterion, as the launcher wrote it to acceptance.json."""

    criterion: str
    ok: bool | None
    """None: not required by the configuration, and not judged."""
    value: str
    how: str
    """How the value is determined."""


@dataclass(frozen=True)
class RunHistory:
    """All records of a run."""

    started_unix_s: float | None
    duration_s: float
    last_phase: str
    phases: list[PhaseSpan]
    imitation: list[Record]
    updates: list[Record]
    evaluations: dict[str, Evaluation]
    """Evaluations by time: "before" and "after" the training phase."""
    peak_bytes: int | None
    acceptance: list[AcceptanceRow]
    instructions: dict[str, str]
    """Instruction of each task, by task id."""

    @property
    def is_finished(self) -> bool:
        """Whether the learner completed the run."""
        return self.last_phase == "finished"


def read_history(run_dir: RunDir) -> RunHistory:
    """Read all records of a run directory."""
    lines = [line for line in run_dir.read_metrics() if isinstance(line, dict)]
    clock = [unix_s for line in lines if (unix_s := number(line, "unix_s")) is not None]
    supervisor = _read_json(run_dir.supervisor)
    started = number(supervisor, "started_unix_s") if isinstance(supervisor, dict) else None
    if started is None and clock:
        started = min(clock)
    ended = max(clock, default=started or 0.0)
    phases = [line for line in lines if line.get("kind") == "phase" and number(line, "unix_s") is not None]
    evaluations = [line for line in lines if line.get("kind") == "eval"]
    memory = [
        peak for line in lines if line.get("kind") == "memory" if (peak := number(line, "peak_bytes")) is not None
    ]
    return RunHistory(
        started_unix_s=started,
        duration_s=max(0.0, ended - (started or ended)),
        last_phase=str(phases[-1].get("phase", "")) if phases else "",
        phases=_phase_spans(phases, started or ended, ended),
        imitation=_last_per_update(lines, "imitation"),
        updates=_last_per_update(lines, "update"),
        evaluations={str(line.get("when")): _evaluation(line) for line in evaluations},
        peak_bytes=int(max(memory)) if memory else None,
        acceptance=_acceptance_rows(_read_json(run_dir.acceptance)),
        instructions=_instructions(_read_json(run_dir.tasks)),
    )


def number(record: Record, key: str) -> float | None:
    """Return a finite number of a record; None if it is missing, of another type, NaN or infinite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def curve(records: Sequence[Record], key: str) -> Points:
    """Return one key of the records over the update number."""
    return [(float(record["update"]), number(record, key)) for record in records]


def task_counts(record: Record) -> dict[str, Count]:
    """Return the counts by task of an update or an evaluation (key `per_task`)."""
    counts = {}
    per_task = record.get("per_task")
    for task, value in per_task.items() if isinstance(per_task, dict) else ():
        if isinstance(value, dict) and (count := _count(number(value, "success"), number(value, "n"))):
            counts[str(task)] = count
    return counts


def _count(successes: float | None, n: float | None) -> Count | None:
    if successes is None or n is None or not 0 <= successes <= n:
        return None
    return Count(round(successes), round(n))


def _evaluation(line: Record) -> Evaluation:
    per_task = task_counts(line)
    overall = _count(number(line, "successes"), number(line, "episodes")) or sum(per_task.values(), Count(0, 0))
    return Evaluation(
        overall,
        per_task,
        mismatch_mean=number(line, "mismatch_mean"),
        mismatch_max=number(line, "mismatch_max"),
        num_faulted=round(number(line, "num_faulted") or 0),
        num_other_version=round(number(line, "num_other_version") or 0),
    )


def _last_per_update(lines: Sequence[Record], kind: str) -> list[Record]:
    """Return the lines of a kind in the order of their updates, the last line for each update."""
    by_update = {
        update: line for line in lines if line.get("kind") == kind and (update := number(line, "update")) is not None
    }
    return [by_update[update] for update in sorted(by_update)]


def _phase_spans(phases: Sequence[Record], started: float, ended: float) -> list[PhaseSpan]:
    """Return the period of each phase, which lasts until the next one; `starting` precedes the first phase."""
    marks = [("starting", started), *((str(line.get("phase", "?")), float(line["unix_s"])) for line in phases)]
    ends = [at for _, at in marks[1:]] + [ended]
    return [
        PhaseSpan(phase, at - started, end - started)
        for (phase, at), end in zip(marks, ends, strict=True)
        if end > at and phase != "finished"
    ]


def _acceptance_rows(value: Any) -> list[AcceptanceRow]:
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [
        AcceptanceRow(
            criterion=str(row.get("criterion", "")),
            ok=row["ok"] if isinstance(row.get("ok"), bool) else None,
            value=str(row.get("value", "")),
            how=str(row.get("how", "")),
        )
        for row in rows
    ]


def _instructions(tasks: Any) -> dict[str, str]:
    files = tasks.items() if isinstance(tasks, dict) else ()
    return {
        str(task): str(file["instruction"]) for task, file in files if isinstance(file, dict) and "instruction" in file
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
