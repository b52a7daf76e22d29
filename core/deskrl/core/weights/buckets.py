"""Bucket layout of a weight transfer, which sender and receiver compute independently from the tensor sizes.

Every tensor starts at a new row, so that checksums of tensors are sums over rows (`deskrl.core.weights.checksums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROW_BYTES = 512
"""Row size: tensors start at multiples of it, which satisfies the alignment of every dtype."""
BUCKET_BYTES = 512 * 1024**2
"""Default bucket capacity: large enough for full bandwidth, small compared with a model."""


@dataclass(frozen=True)
class Piece:
    """Location of one tensor in its bucket."""

    tensor: int
    """Index of the tensor in the announcement."""
    offset: int
    """Offset in the bucket, in bytes."""
    num_bytes: int

    @property
    def first_row(self) -> int:
        """Index of the first row."""
        return self.offset // ROW_BYTES

    @property
    def num_rows(self) -> int:
        """Number of rows; an empty tensor occupies one."""
        return max(1, -(-self.num_bytes // ROW_BYTES))


@dataclass(frozen=True)
class Bucket:
    """Tensors that are transferred together."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes, including the padding of the last row of each tensor."""
        last = self.pieces[-1]
        return last.offset + last.num_rows * ROW_BYTES


def plan_buckets(sizes_bytes: Sequence[int], capacity_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Assign tensors to buckets in their order; a tensor larger than the capacity gets its own bucket.

    Args:
        sizes_bytes: sizes of the tensors.
        capacity_bytes: capacity of a bucket.
    """
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    end = 0
    for tensor, num_bytes in enumerate(sizes_bytes):
        padded = Piece(tensor, 0, num_bytes).num_rows * ROW_BYTES
        if pieces and end + padded > capacity_bytes:
            buckets.append(Bucket(tuple(pieces)))
            pieces, end = [], 0
        pieces.append(Piece(tensor, end, num_bytes))
        end += padded
    if pieces:
        buckets.append(Bucket(tuple(pieces)))
    return tuple(buckets)
