"""What one rank is fed: its share of the rows, in micro-batches, each made while the one before it is learnt from.

Knows ranks and the token budget; knows nothing of rewards. A stop is noticed between micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from deskrl.learner.batches.batch import Collator, MicroBatch
from deskrl.learner.batches.packing import Row, rank_micro_batches


class Feed:
    """Micro-batches for one rank.

    Args:
        collator: of the policy.
        rank: this rank.
        num_ranks: ranks that share the rows.
        max_tokens: of a micro-batch, those of screenshots counted.
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
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as ahead:
            coming = [ahead.submit(self._collator.collate, rows) for rows in share[:1]]
            for index in range(len(share)):
                self._check_stop()
                micro = coming.pop().result()
                coming += [ahead.submit(self._collator.collate, rows) for rows in share[index + 1 : index + 2]]
                yield micro
