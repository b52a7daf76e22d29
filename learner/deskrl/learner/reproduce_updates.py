"""Trains again on the recorded batches of a run and compares the results: the learner's part of `deskrl reproduce`.

All numbers follow from a checkpoint and the batches after it, so the same machine reproduces them bit for bit. Nothing
is planned, committed or published; the only output is a file with the comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.process_lifecycle import die_with_parent, stop_event
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import VersionSpan
from deskrl.learner.batch_agreement import BatchDamagedError
from deskrl.learner.batch_builder import BatchBuilder
from deskrl.learner.checkpoint.checkpoint_files import Checkpoint
from deskrl.learner.components import Components, build_components
from deskrl.learner.grpo import train_on_groups
from deskrl.learner.metrics.metric_records import update_record
from deskrl.learner.train_state import TrainState

COMPARED = ("loss", "gradient_norm", "entropy", "clip_fraction", "importance_mean", "num_tokens", "success_rate")
"""Keys of an update's record that follow from checkpoint and batch alone."""

_log = logging.getLogger(__name__)


def main(config: RunConfig, outcome: Path) -> int:
    """Reproduce all updates for which a checkpoint and the batch are kept, and write how they compare.

    Args:
        config: configuration of the run, whose replay service must be running.
        outcome: file to write: {"updates": [{"update", "checkpoint", "recorded", "again"}], "missing": {update: why}}.
    """
    die_with_parent()
    without_tracker = config.model_copy(update={"tracker": ()})
    components = build_components(without_tracker, stop_event())
    try:
        comparison = _Reproduction(without_tracker, components).run()
        if components.is_rank_0:
            write_json(outcome, comparison)
    finally:
        components.close()
    return 0


class _Reproduction:
    """Reproduces the updates of a run on one rank."""

    def __init__(self, config: RunConfig, components: Components) -> None:
        self._config = config
        self._components = components
        self._batch_builder = BatchBuilder(
            config, components.curriculum, components.replay, is_planner=False, processor_hash=components.processor_hash
        )
        self._lineages = components.checkpoints.read_lineages()
        # An update that a crash undid was repeated: the last record of its number is the valid one.
        updates = RunDir(config.run_dir).read_metrics("update")
        self._recorded = {record["update"]: record for record in updates}

    def run(self) -> dict[str, Any]:
        """Reproduce the updates after each checkpoint as far as batches are kept; each update once."""
        done: dict[int, dict[str, Any]] = {}
        missing = {number: "no checkpoint before it is kept (learner.keep_checkpoints)" for number in self._recorded}
        for checkpoint in self._components.checkpoints.list_all():
            if checkpoint.num_updates + 1 in done or checkpoint.num_updates + 1 not in self._recorded:
                continue
            self._components.checkpoints.check_usable(checkpoint)
            self._components.checkpoints.load(checkpoint, self._components.engine)
            self._reproduce_from(checkpoint, done, missing)
        return {
            "updates": [done[number] for number in sorted(done)],
            "missing": {str(number): why for number, why in sorted(missing.items()) if number not in done},
        }

    def _reproduce_from(self, checkpoint: Checkpoint, done: dict[int, dict[str, Any]], missing: dict[int, str]) -> None:
        """Reproduce the updates after a loaded checkpoint."""
        state = TrainState.from_json(checkpoint.state)
        while (number := state.num_updates + 1) in self._recorded:
            try:
                reproduced = self._reproduce_next(state)
            except (UserError, BatchDamagedError) as error:  # the replay service no longer has the batch
                missing[number] = error.message if isinstance(error, UserError) else str(error)
                return
            recorded = {key: self._recorded[number][key] for key in COMPARED}
            done[number] = {
                "update": number,
                "checkpoint": checkpoint.path.name,
                "recorded": recorded,
                "again": {key: reproduced[key] for key in COMPARED},
            }
            _log.info("update %d: loss %r, recorded %r", number, reproduced["loss"], recorded["loss"])

    def _reproduce_next(self, state: TrainState) -> Mapping[str, Any]:
        """Reproduce the update that follows `state`, advance the state and return the record of the update."""

        def staleness(span: VersionSpan) -> int | None:
            return self._lineages.distance(span.lineage, span.step, state.num_updates)

        components, seed = self._components, self._config.seed
        batch = self._batch_builder.build(state, staleness)
        report = train_on_groups(
            components.engine,
            components.loader,
            batch.kept,
            staleness,
            self._config.learner.grpo,
            seed,
            state.num_updates,
            components.reference,
        )
        state.num_updates += 1
        num_tasks = components.curriculum.num_tasks
        return update_record(batch, report, state.num_updates, self._config, num_tasks, status=None)
