"""What one rank is fed: its share of the rows, in micro-batches, each made when its turn comes.

Knows ranks and the token budget; knows nothing of rewards. A stop is noticed between micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from deskrl.learner.batch import Collator, MicroBatch
from deskrl.learner.packing import Row, rank_micro_batches


class Feed:
    """Micro-batches for one rank.

    Args:
        collator: of the policy.
        rank: this rank.
        num_ranks: ranks that share the rows.
        max_tokens: of a micro-batch, padding counted.
        check_stop: raises if it is time to end.
    """

    def __init__(
        self, collator: Collator, rank: int, num_ranks: int, max_tokens: int, check_stop: Callable[[], None]
    ) -> None:
        self._collator = collator
        self._rank = rank
        self._num_ranks = num_ranks
        self._max_tokens = max_tokens
        self._check_stop = check_stop

    def share(self, rows: Sequence[Row]) -> list[list[Row]]:
        """This rank's micro-batches, as rows; equally many on every rank."""
        return rank_micro_batches(rows, self._rank, self._num_ranks, self._max_tokens)

    def batches(self, share: Sequence[Sequence[Row]]) -> Iterator[MicroBatch]:
        """Their tensors, one after another."""
        for rows in share:
            self._check_stop()
            yield self._collator.collate(rows)
