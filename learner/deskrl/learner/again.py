"""Learns again from a run's recorded batches and compares: the learner's half of `deskrl replay-run`.

From a checkpoint and the batches after it everything follows, so the same machine finds the same numbers, bit for bit.
Plans nothing, commits nothing, publishes nothing; writes one file, the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.lifetime import die_with_parent, stop_event
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.core.trajectory import Span
from deskrl.learner.main import learn_batch
from deskrl.learner.parts import Parts, assemble
from deskrl.learner.policy.checkpoint import Checkpoint
from deskrl.learner.records import update_record
from deskrl.learner.state import LearnerState
from deskrl.learner.take import BatchTaker

COMPARED = ("loss", "gradient_norm", "entropy", "clip_fraction", "importance_mean", "num_tokens", "success_rate")
"""Keys of an update's record that follow from checkpoint and batch alone."""

_log = logging.getLogger("deskrl.learner")


def main(config: RunConfig, outcome: Path) -> int:
    """Learn again whatever updates can be, and write how they compare.

    Args:
        config: of the run, whose replay service answers.
        outcome: file for {"updates": [{"update", "checkpoint", "recorded", "again"}], "missing": {update: why not}}.
    """
    die_with_parent()
    quiet = config.model_copy(update={"wandb": "off"})
    parts = assemble(quiet, stop_event(), lambda update: None)
    try:
        result = _Repetition(quiet, parts).run()
        if parts.engine.rank == 0:
            write_json(outcome, result)
    finally:
        parts.close()
    return 0


class _Repetition:
    """One rank that learns again."""

    def __init__(self, config: RunConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._taker = BatchTaker(config, parts.curriculum, parts.replay, False, parts.processor_hash)
        self._tree = parts.checkpoints.read_lineages()
        # An update that a crash undid was learnt anew: the last record is of the one that stands.
        updates = RunFolder(config.folder).read_metrics("update")
        self._recorded = {record["update"]: record for record in updates}

    def run(self) -> dict[str, Any]:
        """From each checkpoint as far as the batches reach, where no earlier one has got to already."""
        done: dict[int, dict[str, Any]] = {}
        missing = {number: "no checkpoint before it is kept (learner.keep_checkpoints)" for number in self._recorded}
        for checkpoint in self._parts.checkpoints.found():
            if checkpoint.num_updates + 1 in done or checkpoint.num_updates + 1 not in self._recorded:
                continue
            self._parts.checkpoints.check_whole(checkpoint)
            self._parts.checkpoints.load(checkpoint, self._parts.engine)
            self._go_on(checkpoint, done, missing)
        return {
            "updates": [done[number] for number in sorted(done)],
            "missing": {str(number): why for number, why in sorted(missing.items()) if number not in done},
        }

    def _go_on(self, checkpoint: Checkpoint, done: dict[int, dict[str, Any]], missing: dict[int, str]) -> None:
        state = LearnerState.from_json(checkpoint.state)
        while (number := state.num_updates + 1) in self._recorded:
            try:
                again = self._learn_next(state)
            except UserError as error:  # replay holds the batch no more
                missing[number] = error.message
                return
            recorded = {key: self._recorded[number][key] for key in COMPARED}
            done[number] = {
                "update": number,
                "checkpoint": checkpoint.path.name,
                "recorded": recorded,
                "again": {key: again[key] for key in COMPARED},
            }
            _log.info("update %d: loss %r, recorded %r", number, again["loss"], recorded["loss"])

    def _learn_next(self, state: LearnerState) -> Mapping[str, Any]:
        """The record of the update after `state`, which moves on."""

        def distance(span: Span) -> int | None:
            return self._tree.distance(span.lineage, span.step, state.num_updates)

        batch = self._taker.take(state, distance)
        report = learn_batch(self._parts, batch, distance, self._config, state.num_updates)
        state.num_updates += 1
        return update_record(
            batch, report, state.num_updates, self._config, self._parts.curriculum.num_tasks, status=None
        )
