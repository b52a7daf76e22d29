"""Collects logprob and entropy of each token of a batch and groups them by episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deskrl.learner.batches.packing import Row
from deskrl.learner.batches.token_stats import EpisodeTokenStats

RowStats = dict[tuple[int, int], tuple[list[float], list[float]]]
"""Logprobs and entropies of each row's targets, by trajectory and first step of the row."""


class TokenStatsCollector:
    """Collects the token statistics of one rank."""

    def __init__(self) -> None:
        self._by_row: RowStats = {}

    def add(self, rows: Sequence[Row], logprobs_N: Tensor, entropy_N: Tensor) -> None:
        """Add a micro-batch that was collated from these rows in this order."""
        logprobs, entropies = logprobs_N.tolist(), entropy_N.tolist()
        start = 0
        for row in rows:
            end = start + len(row.targets)
            if row.targets:
                self._by_row[row.trajectory, row.first_step] = logprobs[start:end], entropies[start:end]
            start = end

    def gather(
        self,
        gather: Callable[[RowStats], list[RowStats]],
        names_T: Sequence[tuple[str, str]],
        advantages_T: Tensor,
        from_buffer_T: Tensor,
    ) -> dict[str, dict[str, EpisodeTokenStats]]:
        """Return the statistics of all ranks by group and episode on rank 0, nothing on other ranks.

        Args:
            gather: collective operation that returns each rank's argument on rank 0 and an empty list on the others.
            names_T: group id and episode id of each trajectory of the batch.
            advantages_T: advantage of each trajectory.
            from_buffer_T: whether a trajectory is a success from the success buffer.
        """
        by_row: RowStats = {}
        for part in gather(self._by_row):
            by_row |= part
        by_trajectory: dict[int, tuple[list[float], list[float]]] = {}
        for (trajectory, _), (logprobs, entropies) in sorted(by_row.items()):
            values = by_trajectory.setdefault(trajectory, ([], []))
            values[0].extend(logprobs)
            values[1].extend(entropies)
        stats: dict[str, dict[str, EpisodeTokenStats]] = {}
        for trajectory, (logprobs, entropies) in by_trajectory.items():
            group_id, episode_id = names_T[trajectory]
            stats.setdefault(group_id, {})[episode_id] = EpisodeTokenStats(
                float(advantages_T[trajectory]),
                bool(from_buffer_T[trajectory]),
                tuple(logprobs),
                tuple(entropies),
            )
        return stats
