"""What a run wrote down about itself, read forgivingly: a missing key is a gap, a torn file is absent.

Knows the kinds of lines in metrics.jsonl and the files beside it; nothing of how they are shown. A resumed run repeats
updates: the last word on each one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core.runfolder import RunFolder
from deskrl.core.running.acceptance import Criterion
from deskrl.core.stats import wilson_interval

Record = Mapping[str, Any]
Points = list[tuple[float, float | None]]
"""A curve: None where a value is missing or not finite."""


@dataclass(frozen=True)
class Count:
    """Successes among episodes, with Wilson's 95 % interval."""

    successes: int
    n: int

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(self.successes + other.successes, self.n + other.n)

    @property
    def rate(self) -> float | None:
        """Share of successes; None of nothing."""
        return self.successes / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate."""
        return wilson_interval(self.successes, self.n)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, overall and by task; how far its logprobs were from the learner's."""

    overall: Count
    per_task: dict[str, Count]
    mismatch_mean: float | None
    mismatch_max: float | None
    num_faulted: int
    num_other_version: int
    """Episodes that do not count, because another policy version than the evaluated one acted in them."""


@dataclass(frozen=True)
class PhaseSpan:
    """A stretch of wall clock, in seconds since the start of the run."""

    phase: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class History:
    """A run's own records."""

    started_unix_s: float | None
    duration_s: float
    last_phase: str
    phases: list[PhaseSpan]
    imitation: list[Record]
    updates: list[Record]
    evaluations: dict[str, Evaluation]
    """By `when`: before, after."""
    peak_bytes: int | None
    criteria: list[Criterion]
    instructions: dict[str, str]
    """What each task asks for, as tasks.json has it."""

    @property
    def finished(self) -> bool:
        """Whether the learner came to its end."""
        return self.last_phase == "finished"


def read_history(folder: RunFolder) -> History:
    """All that the run's folder says."""
    lines = [line for line in folder.read_metrics() if isinstance(line, dict)]
    clock = [unix_s for line in lines if (unix_s := number(line, "unix_s")) is not None]
    supervisor = _read_json(folder.supervisor)
    started = number(supervisor, "started_unix_s") if isinstance(supervisor, dict) else None
    if started is None and clock:
        started = min(clock)
    ended = max(clock, default=started or 0.0)
    phases = [line for line in lines if line.get("kind") == "phase" and number(line, "unix_s") is not None]
    evaluations = [line for line in lines if line.get("kind") == "eval"]
    memory = [
        peak for line in lines if line.get("kind") == "memory" if (peak := number(line, "peak_bytes")) is not None
    ]
    return History(
        started_unix_s=started,
        duration_s=max(0.0, ended - (started or ended)),
        last_phase=str(phases[-1].get("phase", "")) if phases else "",
        phases=_phase_spans(phases, started or ended, ended),
        imitation=_last_of_each(lines, "imitation"),
        updates=_last_of_each(lines, "update"),
        evaluations={str(line.get("when")): _evaluation(line) for line in evaluations},
        peak_bytes=int(max(memory)) if memory else None,
        criteria=_criteria(_read_json(folder.results / "acceptance.json")),
        instructions=_instructions(_read_json(folder.root / "tasks.json")),
    )


def number(record: Record, key: str) -> float | None:
    """A finite number, or None: missing, of another type, NaN or infinite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def curve(records: Sequence[Record], key: str) -> Points:
    """One key over updates."""
    return [(float(record["update"]), number(record, key)) for record in records]


def task_counts(record: Record) -> dict[str, Count]:
    """`per_task` of an update or an evaluation."""
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


def _last_of_each(lines: Sequence[Record], kind: str) -> list[Record]:
    """Lines of a kind in the order of their updates, the last one of each."""
    by_update = {
        update: line for line in lines if line.get("kind") == kind and (update := number(line, "update")) is not None
    }
    return [by_update[update] for update in sorted(by_update)]


def _phase_spans(phases: Sequence[Record], started: float, ended: float) -> list[PhaseSpan]:
    """Each phase lasts until the next one; what comes before the first is the start of the roles."""
    marks = [("starting", started), *((str(line.get("phase", "?")), float(line["unix_s"])) for line in phases)]
    ends = [at for _, at in marks[1:]] + [ended]
    return [
        PhaseSpan(phase, at - started, end - started)
        for (phase, at), end in zip(marks, ends, strict=True)
        if end > at and phase != "finished"
    ]


def _criteria(value: Any) -> list[Criterion]:
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [
        Criterion(
            str(row.get("criterion", "")), _verdict(row.get("ok")), *(str(row.get(k, "")) for k in ("value", "how"))
        )
        for row in rows
    ]


def _verdict(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


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
