"""Checksums of the tensors in a bucket, computed on the device of the bucket at the cost of a few passes over memory.

The bytes of a tensor are read as 64-bit words in zero-padded rows of 512 bytes. The checksum is the sum, modulo 2^64,
of all words multiplied by an odd weight of the column and an odd weight of the row. A changed word always changes the
checksum, and so do swapped words, except with negligible probability. It is independent of the position of the tensor.

Uses methods of the tensors of its callers and does not import torch, which core does not depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.core.weights.buckets import ROW_BYTES, Bucket

_WORDS = ROW_BYTES // 8
_SLICE_ROWS = 64 * 1024**2 // ROW_BYTES
"""Rows processed at a time: the products need little memory and stay mostly in the cache of a GPU."""
_ROW_BASE, _ROW_STEP = 0x5851F42D4C957F2D, 0x14057B7EF767814E
"""Odd base and even step, so that the weight of every row is odd."""


class BucketChecksums:
    """Computes the checksums of tensors in buckets.

    Args:
        buckets: bucket layout.
        words: any int64 tensor on the device of the buckets.
    """

    def __init__(self, buckets: Sequence[Bucket], words: Any) -> None:
        self._buckets = buckets
        self._column_weights = words.new_tensor(_column_weights())
        most_rows = max(bucket.num_bytes for bucket in buckets) // ROW_BYTES
        self._row_numbers = words.new_ones(most_rows).cumsum(0) - 1
        self._first = [words.new_tensor([piece.first_row for piece in bucket.pieces]) for bucket in buckets]
        self._last = [
            words.new_tensor([piece.first_row + piece.num_rows - 1 for piece in bucket.pieces]) for bucket in buckets
        ]

    def compute(self, index: int, words: Any) -> Any:
        """Return the checksums of the tensors of a bucket as one int64 tensor.

        Args:
            index: index of the bucket.
            words: int64 view of the memory of the bucket.
        """
        num_rows = self._buckets[index].num_bytes // ROW_BYTES
        rows_RW = words[: num_rows * _WORDS].view(num_rows, _WORDS)
        sums_R = words.new_empty(num_rows)
        for start in range(0, num_rows, _SLICE_ROWS):
            part_RW = rows_RW[start : start + _SLICE_ROWS]
            sums_R[start : start + _SLICE_ROWS] = (part_RW * self._column_weights).sum(1)
        numbered_R = sums_R * self._row_numbers[:num_rows]
        first, last = self._first[index], self._last[index]
        plain = _sums_between(sums_R, first, last)
        # Rows are numbered from the first row of the tensor.
        numbered = _sums_between(numbered_R, first, last) - first * plain
        return plain * _ROW_BASE + numbered * _ROW_STEP


def _sums_between(values: Any, first: Any, last: Any) -> Any:
    """Return the sums of `values[first]` to `values[last]`, both inclusive."""
    running = values.cumsum(0)
    return running[last] - running[first] + values[first]


def _column_weights() -> list[int]:
    """Return pseudorandom odd weights as signed 64-bit integers (splitmix64)."""
    weights = []
    state = 0
    for _ in range(_WORDS):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        odd = (mixed ^ (mixed >> 31)) | 1
        weights.append(odd - 2**64 if odd >= 2**63 else odd)
    return weights
