"""Optimizer state of ZeRO is divided anew for another number of ranks without a change of a single element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deskrl.learner.policy.resharding import Sharding, reshard

WHOLE_GROUPS, PARAMETERS = Sharding([[7], [40], [1]], 2), Sharding([[7], [5, 1, 12], [3]], 1)


def shards_of(pieces: list[Tensor], sharding: Sharding, num_ranks: int) -> list[Tensor]:
    """Return each rank's shard as ZeRO divides it: every piece is padded and cut into equal parts."""
    shards = []
    for rank in range(num_ranks):
        parts = []
        for piece in pieces:
            size = sharding.shard_size(len(piece), num_ranks)
            padded = torch.nn.functional.pad(piece, (0, size * num_ranks - len(piece)))
            parts.append(padded[rank * size : (rank + 1) * size])
        shards.append(torch.cat(parts))
    return shards


@pytest.mark.parametrize("sharding", [WHOLE_GROUPS, PARAMETERS], ids=["ZeRO 1 and 2", "ZeRO 3"])
@pytest.mark.parametrize(("num_before", "num_after"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 16), (16, 3)])
def test_shards_are_those_that_the_other_number_of_ranks_would_hold(
    sharding: Sharding, num_before: int, num_after: int
) -> None:
    for index, sizes in enumerate(sharding.pieces):
        pieces = [torch.arange(1, size + 1, dtype=torch.float32) + 100 * number for number, size in enumerate(sizes)]
        before = shards_of(pieces, sharding, num_before)
        after = [reshard(before, sharding, index, rank, num_after) for rank in range(num_after)]
        for found, expected in zip(after, shards_of(pieces, sharding, num_after), strict=True):
            assert found.equal(expected)
