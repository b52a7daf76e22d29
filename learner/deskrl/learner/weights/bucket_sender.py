"""Bucket sender: packs weights on the learner's GPU into buckets and sends these to several replicas concurrently.

Buffers are used in rotation: one is packed while the others are being sent. Under ZeRO 3 the parameters of a bucket are
gathered only while they are packed, so that no GPU ever holds a second copy of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from deskrl.core.error_text import one_line
from deskrl.core.timeouts import WaitFailed
from deskrl.core.weights import gpu_transfer
from deskrl.core.weights.buckets import BUCKET_BYTES, ROW_BYTES, Bucket, plan_buckets
from deskrl.core.weights.checksums import BucketChecksums
from deskrl.learner.weights.sender_transports import Transport, ipc_handle
from deskrl.proto.v1 import weights_pb2

Gather = Callable[[list[Tensor]], AbstractContextManager[Sequence[Tensor]]]
"""Returns a context in which parameters are gathered on this GPU, and whose value are the tensors to send in place of
them; a collective call under ZeRO 3."""


@dataclass(frozen=True)
class SendResult:
    """Result of sending all buckets to several replicas."""

    checksums: list[int]
    """Checksum of each tensor."""
    errors: dict[int, str]
    """Reason of each failed transfer by index of the replica."""
    transfer_s: float
    """Time from the first bucket's arrival to the last's; before that the learner waits for replicas to pause."""
    transferred_bytes: int
    """Bytes sent in that time."""


class BucketSender:
    """Buffers of rank 0, allocated at the first update and kept, because other processes may have mapped them.

    Args:
        device: device of the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with an index, which NCCL requires
        self._slots: list[Tensor] = []
        self._handles: list[dict[str, Any]] = []
        self._plan: tuple[tuple[int, ...], tuple[Bucket, ...], BucketChecksums] | None = None

    @property
    def gpu_uuid(self) -> str:
        """UUID of the GPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def prepare(self, specs: Sequence[weights_pb2.TensorSpec]) -> None:
        """Plan the buckets and allocate the buffers, unless this was done for tensors of the same sizes."""
        sizes = tuple(spec.num_bytes for spec in specs)
        if self._plan is not None and self._plan[0] == sizes:
            return
        buckets = plan_buckets(sizes, BUCKET_BYTES)
        size = max(bucket.num_bytes for bucket in buckets)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(gpu_transfer.NUM_SLOTS)]
        self._handles = []
        words = torch.empty(0, dtype=torch.int64, device=self.device)
        self._plan = (sizes, buckets, BucketChecksums(buckets, words))

    def handles(self) -> list[dict[str, Any]]:
        """Return the CUDA IPC handles of the buffers, for processes on the same GPU."""
        # Exported once for all updates: each export adds to the reference counters that PyTorch keeps of a storage.
        self._handles = self._handles or [ipc_handle(slot) for slot in self._slots]
        return self._handles

    def send(self, tensors: Sequence[Tensor], gather: Gather, transports: Mapping[int, Transport]) -> SendResult:
        """Send all buckets over all transports.

        Args:
            tensors: tensors in the order given to `prepare`.
            gather: gathers sharded parameters.
            transports: transport of each replica by index; a transport that fails is aborted, the others continue.
        """
        assert self._plan is not None
        _, buckets, bucket_checksums = self._plan
        live = _LiveTransports(transports)
        live.each(methodcaller("start", self._slots))
        checksums = []
        since_s, transferred_bytes = time.perf_counter(), sum(bucket.num_bytes for bucket in buckets)
        for index, bucket in enumerate(buckets):
            slot = index % len(self._slots)
            if index >= len(self._slots):
                live.each(methodcaller("wait", slot))
            if index == len(self._slots):  # the first bucket has arrived
                since_s, transferred_bytes = time.perf_counter(), transferred_bytes - buckets[0].num_bytes
            with gather([tensors[piece.tensor] for piece in bucket.pieces]) as whole:
                _pack(self._slots[slot], bucket, whole)
            filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            filled.record()
            live.each(methodcaller("send", slot, bucket.num_bytes, filled))
            checksums.append(bucket_checksums.compute(index, self._slots[slot][: bucket.num_bytes].view(torch.int64)))
        for index in range(max(0, len(buckets) - len(self._slots)), len(buckets)):
            live.each(methodcaller("wait", index % len(self._slots)))
        transfer_s = time.perf_counter() - since_s
        live.each(methodcaller("finish"))
        return SendResult(torch.cat(checksums).tolist(), live.errors, transfer_s, transferred_bytes)


class _LiveTransports:
    """Transports that have not failed."""

    def __init__(self, transports: Mapping[int, Transport]) -> None:
        self._transports = dict(transports)
        self.errors: dict[int, str] = {}

    def each(self, action: Callable[[Transport], None]) -> None:
        """Apply an action to each transport; one that fails is aborted and not used again."""
        for replica, transport in list(self._transports.items()):
            try:
                action(transport)
            except (WaitFailed, OSError, RuntimeError) as error:
                self.errors[replica] = one_line(error)
                transport.abort()
                del self._transports[replica]


def gather_buckets(tensors: Sequence[Tensor], specs: Sequence[weights_pb2.TensorSpec], gather: Gather) -> None:
    """Take part in gathering each bucket, on the ranks that do not send."""
    for bucket in plan_buckets([spec.num_bytes for spec in specs], BUCKET_BYTES):
        with gather([tensors[piece.tensor] for piece in bucket.pieces]):
            pass


def _pack(buffer: Tensor, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
    """Copy the tensors of a bucket, in its order, into a buffer; the last row of each is padded with zeros."""
    for piece, tensor in zip(bucket.pieces, tensors, strict=True):
        end = piece.offset + piece.num_bytes
        if piece.num_bytes:
            source = tensor.detach().reshape(-1)
            buffer[piece.offset : end].view(source.dtype).copy_(source)
        if padding := piece.num_rows * ROW_BYTES - piece.num_bytes:
            buffer[end : end + padding].zero_()
