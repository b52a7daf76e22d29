"""Collects what a batch's forward pass says of each token, and puts it together by episode. Knows rows and ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deskrl.core.scores import EpisodeScores
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy.engine import Engine

_RowScores = dict[tuple[int, int], tuple[list[float], list[float]]]
"""Logprobs and entropies of a row's targets, by trajectory and first step."""


class TokenScores:
    """What this rank has seen of a batch."""

    def __init__(self) -> None:
        self._of_row: _RowScores = {}

    def note(self, rows: Sequence[Row], logprobs_N: Tensor, entropy_N: Tensor) -> None:
        """Take over a micro-batch, made of these rows in this order."""
        logprobs, entropies = logprobs_N.tolist(), entropy_N.tolist()
        start = 0
        for row in rows:
            end = start + len(row.targets)
            if row.targets:
                self._of_row[row.trajectory, row.first_step] = logprobs[start:end], entropies[start:end]
            start = end

    def gather(
        self, engine: Engine, names_T: Sequence[tuple[str, str]], advantages_T: Tensor, replayed_T: Tensor
    ) -> dict[str, dict[str, EpisodeScores]]:
        """By group and episode, of all ranks; nothing on ranks other than the first. A collective call.

        Args:
            engine: joins the ranks.
            names_T: the group and the episode of each trajectory of the batch.
            advantages_T: what each is worth.
            replayed_T: which are stored successes.
        """
        of_row: _RowScores = {}
        for part in engine.gather(self._of_row):
            of_row |= part
        values: dict[int, tuple[list[float], list[float]]] = {}
        for (trajectory, _), (logprobs, entropies) in sorted(of_row.items()):
            of_trajectory = values.setdefault(trajectory, ([], []))
            of_trajectory[0].extend(logprobs)
            of_trajectory[1].extend(entropies)
        scores: dict[str, dict[str, EpisodeScores]] = {}
        for trajectory, (logprobs, entropies) in values.items():
            group_id, episode_id = names_T[trajectory]
            scores.setdefault(group_id, {})[episode_id] = EpisodeScores(
                float(advantages_T[trajectory]),
                bool(replayed_T[trajectory]),
                tuple(logprobs),
                tuple(entropies),
            )
        return scores
