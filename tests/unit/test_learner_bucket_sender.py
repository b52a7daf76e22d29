"""Bucket sender: buckets contain the tensors unchanged, and a failing replica does not affect the others."""

from __future__ import annotations

from operator import methodcaller

import pytest
import torch

from deskrl.core.timeouts import WaitFailed
from deskrl.core.weights.buckets import plan_buckets
from deskrl.core.weights.checksums import BucketChecksums
from deskrl.learner.weights.bucket_sender import _LiveTransports, _pack

TENSORS = [torch.randn(3, 5), torch.randn(700).bfloat16(), torch.empty(0), torch.randn(2, 2, 2).double()]


def packed(tensors: list[torch.Tensor], fill: int) -> tuple[list[torch.Tensor], list[int]]:
    """Return each bucket's bytes and all checksums, packed into buffers filled with another value before."""
    buckets = plan_buckets([tensor.nbytes for tensor in tensors], capacity_bytes=2048)
    sums = BucketChecksums(buckets, torch.empty(0, dtype=torch.int64))
    buffers, checksums = [], []
    for index, bucket in enumerate(buckets):
        buffer = torch.full((4096,), fill, dtype=torch.uint8)
        _pack(buffer, bucket, [tensors[piece.tensor] for piece in bucket.pieces])
        buffers.append(buffer[: bucket.num_bytes])
        checksums += sums.compute(index, buffers[-1].view(torch.int64)).tolist()
    return buffers, checksums


def test_every_tensor_can_be_read_back_from_its_bucket() -> None:
    buffers, _ = packed(TENSORS, fill=255)
    for bucket, buffer in zip(plan_buckets([t.nbytes for t in TENSORS], 2048), buffers, strict=True):
        for piece in bucket.pieces:
            tensor = TENSORS[piece.tensor]
            data = buffer[piece.offset : piece.offset + piece.num_bytes].view(tensor.dtype).view(tensor.shape)
            assert torch.equal(data, tensor)


def test_checksums_do_not_depend_on_previous_contents_of_a_buffer() -> None:
    assert packed(TENSORS, fill=0)[1] == packed(TENSORS, fill=255)[1]


def test_one_changed_element_changes_the_checksum_of_its_tensor_only() -> None:
    changed = [tensor.clone() for tensor in TENSORS]
    changed[1][699] += 1
    before, after = packed(TENSORS, fill=0)[1], packed(changed, fill=0)[1]
    assert [index for index in range(4) if before[index] != after[index]] == [1]


class Recording:
    """Transport that records its calls and fails from the call number `fails_at` on."""

    def __init__(self, fails_at: int) -> None:
        self.calls: list[str] = []
        self._fails_at = fails_at

    def wait(self, slot: int) -> None:
        self.calls.append(f"wait {slot}")
        if len(self.calls) > self._fails_at:
            raise WaitFailed("the replica takes no bucket: nothing within 15 s")

    def abort(self) -> None:
        self.calls.append("abort")


def test_a_failing_transport_is_aborted_and_the_others_continue() -> None:
    failing, working = Recording(fails_at=1), Recording(fails_at=9)
    live = _LiveTransports({0: failing, 1: working})  # type: ignore[dict-item]
    for slot in range(3):
        live.each(methodcaller("wait", slot))
    assert failing.calls == ["wait 0", "wait 1", "abort"]
    assert working.calls == ["wait 0", "wait 1", "wait 2"]
    assert live.errors == {0: "the replica takes no bucket: nothing within 15 s"}


def test_a_programming_error_is_not_attributed_to_a_replica() -> None:
    live = _LiveTransports({0: Recording(fails_at=9)})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        live.each(methodcaller("wait"))
