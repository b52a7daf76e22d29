"""Checksums of tensors in a bucket, computed where the bucket lies: 16 GB in the time of a few passes over memory.

A tensor's bytes are read as 64-bit words in rows of 512 bytes, zero-padded. Its sum is, modulo 2^64, that of all words,
each times an odd weight of its column times an odd weight of its row, so that a changed word is always seen, and words
that changed places are too. It does not depend on where in which bucket the tensor lies.

Works on the methods of torch's tensors and imports no torch, as nothing here does: sender and receiver hand theirs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.core.weights.buckets import ROW_BYTES, Bucket

_WORDS = ROW_BYTES // 8
_SLICE_ROWS = 64 * 1024**2 // ROW_BYTES
"""Rows weighted at once: the products need no second bucket, and much of them stays in a GPU's cache."""
_ROW_BASE, _ROW_STEP = 0x5851F42D4C957F2D, 0x14057B7EF767814E
"""Odd and even, so that the weight of every row is odd."""


class BucketSums:
    """The checksums of one plan's tensors.

    Args:
        buckets: the plan.
        words: any int64 tensor on the device where sums are computed.
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

    def of(self, index: int, words: Any) -> Any:
        """Checksums of the tensors of bucket number `index`, as one int64 tensor.

        Args:
            index: which bucket.
            words: int64 view of its memory, from its start.
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
        # Rows are numbered from the tensor's own first one.
        numbered = _sums_between(numbered_R, first, last) - first * plain
        return plain * _ROW_BASE + numbered * _ROW_STEP


def _sums_between(values: Any, first: Any, last: Any) -> Any:
    """Sums of `values[first]` to `values[last]`, both counted."""
    running = values.cumsum(0)
    return running[last] - running[first] + values[first]


def _column_weights() -> list[int]:
    """Odd numbers without a pattern, signed as int64 is (splitmix64)."""
    weights = []
    state = 0
    for _ in range(_WORDS):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        odd = (mixed ^ (mixed >> 31)) | 1
        weights.append(odd - 2**64 if odd >= 2**63 else odd)
    return weights
