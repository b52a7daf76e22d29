"""Sender and receiver pack alike, and what arrived otherwise than it was sent is told from it by its sum."""

from __future__ import annotations

import pytest
import torch

from deskrl.core.weights.buckets import ROW_BYTES, Bucket, plan_buckets
from deskrl.core.weights.sums import BucketSums


def layout(buckets: tuple[Bucket, ...]) -> list[list[tuple[int, int, int]]]:
    return [[(piece.tensor, piece.offset, piece.num_bytes) for piece in bucket.pieces] for bucket in buckets]


def test_tensors_go_in_order_and_begin_at_rows_of_their_own() -> None:
    buckets = plan_buckets([512, 10, 1024, 512], capacity_bytes=2048)
    assert layout(buckets) == [[(0, 0, 512), (1, 512, 10), (2, 1024, 1024)], [(3, 0, 512)]]
    assert [bucket.num_bytes for bucket in buckets] == [2048, 512]


def test_a_tensor_larger_than_a_bucket_travels_alone() -> None:
    assert layout(plan_buckets([100, 5000, 100], capacity_bytes=1024)) == [[(0, 0, 100)], [(1, 0, 5000)], [(2, 0, 100)]]


def test_a_tensor_without_elements_has_its_row() -> None:
    buckets = plan_buckets([0, 8], capacity_bytes=1024)
    assert layout(buckets) == [[(0, 0, 0), (1, 512, 8)]]


def test_nothing_needs_no_bucket() -> None:
    assert plan_buckets([], capacity_bytes=1024) == ()


def sums(words: torch.Tensor, sizes: list[int], capacity_bytes: int = 2**30) -> list[int]:
    """Sums of tensors that lie in `words` one after another, each from a row of its own, packed by a plan."""
    buckets = plan_buckets(sizes, capacity_bytes)
    planned = BucketSums(buckets, words)
    found: list[int] = []
    start = 0
    for index, bucket in enumerate(buckets):
        found += planned.of(index, words[start : start + bucket.num_bytes // 8]).tolist()
        start += bucket.num_bytes // 8
    return found


ROW_WORDS = ROW_BYTES // 8
SIZES = [3 * ROW_BYTES, ROW_BYTES, 5 * ROW_BYTES]


@pytest.fixture
def words() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (9 * ROW_WORDS,), generator=generator)


def test_a_tensor_has_the_same_sum_in_whatever_bucket_it_lies(words: torch.Tensor) -> None:
    together = sums(words, SIZES)
    assert together == sums(words, SIZES, capacity_bytes=ROW_BYTES)
    assert together[1] == sums(words[3 * ROW_WORDS : 4 * ROW_WORDS], SIZES[1:2])[0]


def test_sums_are_the_same_however_many_rows_are_weighted_at_once(
    words: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = sums(words, SIZES)
    monkeypatch.setattr("deskrl.core.weights.sums._SLICE_ROWS", 2)
    assert sums(words, SIZES) == at_once


@pytest.mark.parametrize("bit", [0, 31, 63])
@pytest.mark.parametrize("word", [0, 70, 9 * ROW_WORDS - 1])
def test_every_flipped_bit_is_seen_in_its_tensor_alone(words: torch.Tensor, word: int, bit: int) -> None:
    before = sums(words, SIZES)
    words[word] ^= 1 << bit if bit < 63 else -(2**63)
    after = sums(words, SIZES)
    owner = 0 if word < 3 * ROW_WORDS else 1 if word < 4 * ROW_WORDS else 2
    assert [index for index in range(3) if before[index] != after[index]] == [owner]


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, ROW_WORDS), (5, 2 * ROW_WORDS + 9)])
def test_words_that_changed_places_are_seen(words: torch.Tensor, one: int, other: int) -> None:
    before = sums(words, SIZES)
    words[[one, other]] = words[[other, one]]
    assert sums(words, SIZES)[0] != before[0]


def test_the_sum_is_what_its_definition_says() -> None:
    """One row that holds 1 in its first word and a second that holds 2 there: weights of column 0 and of both rows."""
    words = torch.zeros(2 * ROW_WORDS, dtype=torch.int64)
    words[0], words[ROW_WORDS] = 1, 2
    column = -2152535657050944081  # splitmix64's first number, odd as it is
    base, step = 0x5851F42D4C957F2D, 0x14057B7EF767814E
    expected = (column * base + 2 * column * (base + step)) % 2**64
    assert sums(words, [2 * ROW_BYTES]) == [expected - 2**64 if expected >= 2**63 else expected]
