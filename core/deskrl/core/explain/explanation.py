"""What is told of a run, as plain values. Knows neither how they are found nor how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deskrl.core.arpo.translate import Note
from deskrl.core.explain.batches import Batches, Rows
from deskrl.core.explain.differences import Difference
from deskrl.core.explain.memory import LearnerMemory, ReplicaMemory
from deskrl.core.explain.timing import Timing
from deskrl.core.explain.whole import Whole


@dataclass(frozen=True)
class Explanation:
    """All that is told of a run. What cannot be known here is None, and `remarks` say why."""

    name: str
    preset: str
    model: str
    num_parameters: int | None
    batches: Batches
    rows: Rows
    learner_memory: LearnerMemory | None
    replica_memory: ReplicaMemory | None
    checkpoint_bytes: int | None
    timing: Timing | None
    whole: Whole | None
    max_staleness: int
    assumptions: dict[str, Any]
    differences: list[Difference]
    arpo_keys: list[Note]
    remarks: list[str]
