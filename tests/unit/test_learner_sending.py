"""What leaves the learner's buffers is what the tensors held, and a replica that fails costs the others nothing."""

from __future__ import annotations

from operator import methodcaller

import pytest
import torch

from deskrl.core.bounds import GaveUp
from deskrl.core.weights.buckets import plan_buckets
from deskrl.core.weights.sums import BucketSums
from deskrl.learner.weights.sending import _Live, _pack

TENSORS = [torch.randn(3, 5), torch.randn(700).bfloat16(), torch.empty(0), torch.randn(2, 2, 2).double()]


def packed(tensors: list[torch.Tensor], fill: int) -> tuple[list[torch.Tensor], list[int]]:
    """Each bucket's bytes and all checksums, from buffers that held something else before."""
    buckets = plan_buckets([tensor.nbytes for tensor in tensors], capacity_bytes=2048)
    sums = BucketSums(buckets, torch.empty(0, dtype=torch.int64))
    buffers, checksums = [], []
    for index, bucket in enumerate(buckets):
        buffer = torch.full((4096,), fill, dtype=torch.uint8)
        _pack(buffer, bucket, tensors)
        buffers.append(buffer[: bucket.num_bytes])
        checksums += sums.of(index, buffers[-1].view(torch.int64)).tolist()
    return buffers, checksums


def test_every_tensor_is_read_back_as_it_was() -> None:
    buffers, _ = packed(TENSORS, fill=255)
    for bucket, buffer in zip(plan_buckets([t.nbytes for t in TENSORS], 2048), buffers, strict=True):
        for piece in bucket.pieces:
            tensor = TENSORS[piece.tensor]
            data = buffer[piece.offset : piece.offset + piece.num_bytes].view(tensor.dtype).view(tensor.shape)
            assert torch.equal(data, tensor)


def test_checksums_do_not_tell_what_a_buffer_held_before() -> None:
    assert packed(TENSORS, fill=0)[1] == packed(TENSORS, fill=255)[1]


def test_checksums_tell_one_changed_element() -> None:
    changed = [tensor.clone() for tensor in TENSORS]
    changed[1][699] += 1
    before, after = packed(TENSORS, fill=0)[1], packed(changed, fill=0)[1]
    assert [index for index in range(4) if before[index] != after[index]] == [1]


class Recording:
    """A channel that notes what it is asked, and fails from a certain request on."""

    def __init__(self, fails_at: int) -> None:
        self.asked: list[str] = []
        self._fails_at = fails_at

    def wait(self, slot: int) -> None:
        self.asked.append(f"wait {slot}")
        if len(self.asked) > self._fails_at:
            raise GaveUp("the replica takes no bucket: nothing within 15 s")

    def abort(self) -> None:
        self.asked.append("abort")


def test_a_channel_that_fails_is_let_go_of_and_the_others_go_on() -> None:
    lame, sound = Recording(fails_at=1), Recording(fails_at=9)
    live = _Live({0: lame, 1: sound})  # type: ignore[dict-item]
    for slot in range(3):
        live.each(methodcaller("wait", slot))
    assert lame.asked == ["wait 0", "wait 1", "abort"]
    assert sound.asked == ["wait 0", "wait 1", "wait 2"]
    assert live.errors == {0: "the replica takes no bucket: nothing within 15 s"}


def test_a_fault_of_the_learners_own_is_not_a_replicas() -> None:
    live = _Live({0: Recording(fails_at=9)})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        live.each(methodcaller("wait"))
