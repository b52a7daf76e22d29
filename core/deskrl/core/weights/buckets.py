"""How a model's tensors are packed for a transfer: the plan that sender and receiver each make, and must make alike.

Pure; knows sizes, no tensors and no transport. Every tensor begins at a row of its own, so that sums over rows are sums
over tensors (`weight_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROW_BYTES = 512
"""Tensors begin at multiples of this; it holds every dtype's alignment."""
BUCKET_BYTES = 512 * 1024**2
"""What one bucket holds, unless a single tensor is larger: enough for full bandwidth, little beside a model."""


@dataclass(frozen=True)
class Piece:
    """One tensor in its bucket."""

    tensor: int
    """Its place in the announcement."""
    offset: int
    num_bytes: int

    @property
    def first_row(self) -> int:
        """Where it begins, in rows."""
        return self.offset // ROW_BYTES

    @property
    def num_rows(self) -> int:
        """Rows that it takes; a tensor without elements takes one too."""
        return max(1, -(-self.num_bytes // ROW_BYTES))


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """With the padding of each tensor's last row."""
        last = self.pieces[-1]
        return last.offset + last.num_rows * ROW_BYTES


def plan_buckets(sizes_bytes: Sequence[int], capacity_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Tensors in their order, as many to a bucket as fit; one that is larger than a bucket has one of its own."""
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
