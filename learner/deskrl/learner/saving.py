"""Checkpoints, and replay told of the batches that they hold: a batch is consumed once its checkpoint is on disk.

A checkpoint is written while learning goes on, so replay is told at the learner's next look. What a killed learner did
not come to tell is in the checkpoint, and is told by the one that goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from deskrl.learner.parts import Parts
from deskrl.learner.policy.checkpoint import checkpoint_name
from deskrl.learner.state import LearnerState, PendingCommit
from deskrl.proto.v1 import common_pb2, replay_pb2


class Saving:
    """Saves one rank.

    Args:
        parts: what it works with.
        groups_per_batch: tells, with the length of the task list, which epoch a checkpoint ends.
    """

    def __init__(self, parts: Parts, groups_per_batch: int) -> None:
        self._parts = parts
        self._groups_per_batch = groups_per_batch
        self._begun: tuple[Sequence[PendingCommit], common_pb2.PolicyVersion] = ((), common_pb2.PolicyVersion())

    def begin(self, state: LearnerState, version: common_pb2.PolicyVersion) -> None:
        """Begin to write a checkpoint of the present state, once the one before it is written."""
        self.look(wait=True)
        name = checkpoint_name(state.num_updates, self._groups_per_batch, self._parts.curriculum.num_tasks)
        self._parts.checkpoint_writer.begin(name, state.num_updates, state.to_json())
        self._begun = state.pending, version
        state.pending = []

    def look(self, wait: bool = False) -> None:
        """Tell replay what is consumed, if the checkpoint that was begun is written by now.

        Args:
            wait: until it is.
        """
        if self._parts.checkpoint_writer.finish(wait):
            pending, version = self._begun
            self.commit(pending, version)
            self._begun = (), version

    def commit(self, pending: Sequence[PendingCommit], version: common_pb2.PolicyVersion) -> None:
        """Tell replay of batches in a checkpoint that is on disk; telling it again changes nothing."""
        for batch in pending if self._parts.engine.rank == 0 else ():
            verdicts = [replay_pb2.GroupVerdict(**verdict) for verdict in batch.verdicts]
            self._parts.replay.commit(batch.queue, batch.batch_id, verdicts, version)
