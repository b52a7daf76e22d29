"""Agreement of all ranks, before anything is computed, that they have the same batch with all of its screenshots."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.replay_client import EpisodesDamagedError

_log = logging.getLogger(__name__)


class BatchDamagedError(Exception):
    """Episodes of a batch were damaged on the disk of the replay service, which plays them again: take the batch again.

    Raised on all ranks together, before anything was computed.
    """


def check_agreement(
    engine: DeepSpeedEngine, loader: MicroBatchLoader, rows: Sequence[Row], shards: Sequence[Sequence[Sequence[Row]]]
) -> None:
    """Fetch this rank's screenshots and compare the rows of all ranks; a collective call.

    An episode that is found damaged while some ranks have taken its group, and others have not, is played again: the
    latter get another episode.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        rows: all rows of the batch.
        shards: this rank's micro-batches, as rows, of each part of the batch.

    Raises:
        BatchDamagedError: a screenshot is damaged, or the ranks have different rows.
    """
    has_failed = False
    try:
        for shard in shards:
            loader.prefetch(shard)
    except EpisodesDamagedError as error:
        _log.warning("%s; the batch is taken again", error)
        has_failed = True
    # Numbers only: Python's hash of a text differs between processes.
    own = str(hash(tuple((row.trajectory, row.token_ids, row.behaviour_logprobs) for row in rows)))
    has_failed |= engine.broadcast_from_rank_0(own) != own
    if engine.sum_over_ranks([float(has_failed)])[0] > 0:
        raise BatchDamagedError("episodes of the batch were damaged on the disk of the replay service")
