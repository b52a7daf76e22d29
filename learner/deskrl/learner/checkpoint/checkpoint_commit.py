"""Commits batches to the replay service once the checkpoint that contains them is on disk.

A checkpoint is written in the background, so a commit follows when the learner next polls. Commits that a killed
learner did not send are stored in the checkpoint and are sent by the learner that resumes from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from deskrl.learner.checkpoint.checkpoint_files import checkpoint_name
from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.train_state import PendingCommit, TrainState
from deskrl.proto.v1 import common_pb2, replay_pb2


class CheckpointCommitter:
    """Writes checkpoints of one rank and commits their batches.

    Args:
        writer: checkpoint writer of this rank.
        replay: client of the replay service.
        is_rank_0: whether this is rank 0, the only one that commits.
        groups_per_batch: groups per batch; with `num_tasks` it determines the epoch of a checkpoint.
        num_tasks: length of the task list.
    """

    def __init__(
        self, writer: CheckpointWriter, replay: ReplayClient, *, is_rank_0: bool, groups_per_batch: int, num_tasks: int
    ) -> None:
        self._writer = writer
        self._replay = replay
        self._is_rank_0 = is_rank_0
        self._groups_per_batch = groups_per_batch
        self._num_tasks = num_tasks
        self._begun: tuple[Sequence[PendingCommit], common_pb2.PolicyVersion] = ((), common_pb2.PolicyVersion())

    def begin(self, state: TrainState, version: common_pb2.PolicyVersion) -> None:
        """Start writing a checkpoint of the current state, after the previous checkpoint is written."""
        self.poll(wait=True)
        name = checkpoint_name(state.num_updates, self._groups_per_batch, self._num_tasks)
        self._writer.begin(name, state.num_updates, state.to_json())
        self._begun = state.pending, version
        state.pending = []

    def poll(self, wait: bool = False) -> None:
        """Commit the batches of the checkpoint in progress if it has been written.

        Args:
            wait: whether to wait until it has been written.
        """
        if self._writer.finish(wait):
            pending, version = self._begun
            self.commit(pending, version)
            self._begun = (), version

    def commit(self, pending: Sequence[PendingCommit], version: common_pb2.PolicyVersion) -> None:
        """Commit batches of a checkpoint that is on disk; commits are idempotent."""
        for batch in pending if self._is_rank_0 else ():
            verdicts = [replay_pb2.GroupVerdict(**verdict) for verdict in batch.verdicts]
            self._replay.commit(batch.queue, batch.batch_id, verdicts, version)
