"""Bucket layout of weight transfers, and checksums that detect every changed word."""

from __future__ import annotations

import pytest
import torch

from deskrl.core.weights.buckets import ROW_BYTES, Bucket, plan_buckets
from deskrl.core.weights.checksums import BucketChecksums


def layout(buckets: tuple[Bucket, ...]) -> list[list[tuple[int, int, int]]]:
    return [[(piece.tensor, piece.offset, piece.num_bytes) for piece in bucket.pieces] for bucket in buckets]


def test_tensors_are_placed_in_order_at_starts_of_rows() -> None:
    buckets = plan_buckets([512, 10, 1024, 512], capacity_bytes=2048)
    assert layout(buckets) == [[(0, 0, 512), (1, 512, 10), (2, 1024, 1024)], [(3, 0, 512)]]
    assert [bucket.num_bytes for bucket in buckets] == [2048, 512]


def test_a_tensor_larger_than_a_bucket_gets_its_own_bucket() -> None:
    assert layout(plan_buckets([100, 5000, 100], capacity_bytes=1024)) == [[(0, 0, 100)], [(1, 0, 5000)], [(2, 0, 100)]]


def test_an_empty_tensor_occupies_one_row() -> None:
    buckets = plan_buckets([0, 8], capacity_bytes=1024)
    assert layout(buckets) == [[(0, 0, 0), (1, 512, 8)]]


def test_no_tensors_need_no_bucket() -> None:
    assert plan_buckets([], capacity_bytes=1024) == ()


def sums(words: torch.Tensor, sizes: list[int], capacity_bytes: int = 2**30) -> list[int]:
    """Return the checksums of consecutive tensors in `words`, each starting at a new row."""
    buckets = plan_buckets(sizes, capacity_bytes)
    planned = BucketChecksums(buckets, words)
    found: list[int] = []
    start = 0
    for index, bucket in enumerate(buckets):
        found += planned.compute(index, words[start : start + bucket.num_bytes // 8]).tolist()
        start += bucket.num_bytes // 8
    return found


ROW_WORDS = ROW_BYTES // 8
SIZES = [3 * ROW_BYTES, ROW_BYTES, 5 * ROW_BYTES]


@pytest.fixture
def words() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (9 * ROW_WORDS,), generator=generator)


def test_a_checksum_does_not_depend_on_the_bucket(words: torch.Tensor) -> None:
    together = sums(words, SIZES)
    assert together == sums(words, SIZES, capacity_bytes=ROW_BYTES)
    assert together[1] == sums(words[3 * ROW_WORDS : 4 * ROW_WORDS], SIZES[1:2])[0]


def test_checksums_do_not_depend_on_the_number_of_rows_per_slice(
    words: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = sums(words, SIZES)
    monkeypatch.setattr("deskrl.core.weights.checksums._SLICE_ROWS", 2)
    assert sums(words, SIZES) == at_once


@pytest.mark.parametrize("bit", [0, 31, 63])
@pytest.mark.parametrize("word", [0, 70, 9 * ROW_WORDS - 1])
def test_a_flipped_bit_changes_the_checksum_of_its_tensor_only(words: torch.Tensor, word: int, bit: int) -> None:
    before = sums(words, SIZES)
    words[word] ^= 1 << bit if bit < 63 else -(2**63)
    after = sums(words, SIZES)
    owner = 0 if word < 3 * ROW_WORDS else 1 if word < 4 * ROW_WORDS else 2
    assert [index for index in range(3) if before[index] != after[index]] == [owner]


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, ROW_WORDS), (5, 2 * ROW_WORDS + 9)])
def test_swapped_words_change_the_checksum(words: torch.Tensor, one: int, other: int) -> None:
    before = sums(words, SIZES)
    words[[one, other]] = words[[other, one]]
    assert sums(words, SIZES)[0] != before[0]


def test_a_checksum_follows_its_definition() -> None:
    """The first words of two rows are 1 and 2, so that the weights of column 0 and of both rows matter."""
    words = torch.zeros(2 * ROW_WORDS, dtype=torch.int64)
    words[0], words[ROW_WORDS] = 1, 2
    column = -2152535657050944081  # first number of splitmix64, which is odd
    base, step = 0x5851F42D4C957F2D, 0x14057B7EF767814E
    expected = (column * base + 2 * column * (base + step)) % 2**64
    assert sums(words, [2 * ROW_BYTES]) == [expected - 2**64 if expected >= 2**63 else expected]
