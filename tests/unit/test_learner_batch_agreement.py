"""Agreement of the learner's ranks on a batch: all of them take it again, or none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest

from deskrl.learner.batch_agreement import BatchDamagedError, check_agreement
from deskrl.learner.batches.packing import Row
from deskrl.learner.replay_client import EpisodesDamagedError

ROW = Row(0, (1, 2, 3), (), (2,), (-0.5,), (0,))


class Ranks:
    """Collective calls of two ranks that are threads of this process."""

    def __init__(self) -> None:
        self._barrier = Barrier(2, timeout=20)
        self._values: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = [self._values[0], self._values[1]]
        self._barrier.wait()
        return values


class Rank:
    """Engine and loader of one rank."""

    def __init__(self, ranks: Ranks, rank: int, *, has_damage: bool = False) -> None:
        self._ranks = ranks
        self._rank = rank
        self._has_damage = has_damage
        self.prefetched: list[object] = []

    def broadcast_from_rank_0(self, value: str) -> str:
        return str(self._ranks.exchange(self._rank, value)[0])

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._ranks.exchange(self._rank, values), strict=True)]

    def prefetch(self, shard: object) -> None:
        self.prefetched.append(shard)
        if self._has_damage:
            raise EpisodesDamagedError("replay: a screenshot is damaged")


def agree(first: Rank, second: Rank, rows: Sequence[Sequence[Row]]) -> list[bool]:
    """Check the batch on both ranks at once; returns whether each of them may train on it."""

    def check(rank: Rank, own: Sequence[Row]) -> bool:
        try:
            check_agreement(rank, rank, own, [[own]])  # type: ignore[arg-type]
        except BatchDamagedError:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(check, (first, second), rows))


def test_ranks_with_the_same_batch_train_on_it_with_their_screenshots_fetched() -> None:
    ranks = Ranks()
    first, second = Rank(ranks, 0), Rank(ranks, 1)
    assert agree(first, second, [[ROW], [ROW]]) == [True, True]
    assert first.prefetched == second.prefetched == [[[ROW]]]


@pytest.mark.parametrize("damaged", [0, 1])
def test_all_ranks_take_the_batch_again_if_one_finds_a_damaged_screenshot(damaged: int) -> None:
    ranks = Ranks()
    pair = [Rank(ranks, rank, has_damage=rank == damaged) for rank in range(2)]
    assert agree(pair[0], pair[1], [[ROW], [ROW]]) == [False, False]


def test_all_ranks_take_the_batch_again_if_one_has_an_episode_that_was_played_again() -> None:
    ranks = Ranks()
    again = replace(ROW, behaviour_logprobs=(-0.75,))
    assert agree(Rank(ranks, 0), Rank(ranks, 1), [[ROW], [again]]) == [False, False]
