"""Micro-batch loader: divides rows among ranks and collates the next micro-batch while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from deskrl.learner.batches.collator import Collator, MicroBatch
from deskrl.learner.batches.packing import Row, rank_micro_batches


class MicroBatchLoader:
    """Loads the micro-batches of one rank.

    Args:
        collator: makes micro-batches of rows.
        rank: this rank.
        num_ranks: number of ranks that the rows are divided among.
        max_tokens: limit of tokens in a micro-batch, those of screenshots included.
        check_stop: called before each micro-batch; raises if the process is to stop.
    """

    def __init__(
        self, collator: Collator, rank: int, num_ranks: int, max_tokens: int, check_stop: Callable[[], None]
    ) -> None:
        self._collator = collator
        self._rank = rank
        self._num_ranks = num_ranks
        self._max_tokens = max_tokens
        self._check_stop = check_stop

    def shard(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return this rank's micro-batches, as rows; their number is the same on every rank."""
        return rank_micro_batches(rows, self._rank, self._num_ranks, self._max_tokens)

    def prefetch(self, shard: Sequence[Sequence[Row]]) -> None:
        """Fetch the screenshots of a shard into the cache of the replay client, as far as it has room.

        Raises:
            EpisodesDamagedError: the replay service finds a screenshot damaged.
        """
        for rows in shard:
            self._check_stop()
            self._collator.prefetch(rows)

    def load(self, shard: Sequence[Sequence[Row]]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a shard, in order."""
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as executor:
            pending = [executor.submit(self._collator.collate, rows) for rows in shard[:1]]
            for index in range(len(shard)):
                self._check_stop()
                micro = pending.pop().result()
                pending += [executor.submit(self._collator.collate, rows) for rows in shard[index + 1 : index + 2]]
                yield micro
