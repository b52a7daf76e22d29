"""Weights on the learner's GPU, packed into buckets, on their way to several replicas at once.

A few buffers take turns: one is packed while others are on their way. Under ZeRO 3 a bucket's parameters are gathered
for as long as they are packed, so that no GPU ever holds a second copy of the model. Knows tensors and channels; knows
no replica's address, and no gRPC.
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

from deskrl.core.bounds import GaveUp
from deskrl.core.weights import direct
from deskrl.core.weights.buckets import BUCKET_BYTES, ROW_BYTES, Bucket, plan_buckets
from deskrl.core.weights.sums import BucketSums
from deskrl.learner.weights.channels import Channel, ipc_handle
from deskrl.proto.v1 import weights_pb2

Gather = Callable[[list[Tensor]], AbstractContextManager[Any]]
"""Makes parameters whole on this GPU for as long as they are looked at; a collective call under ZeRO 3."""


@dataclass(frozen=True)
class Sent:
    """What became of sending everything to several replicas."""

    checksums: list[int]
    """Of each tensor."""
    errors: dict[int, str]
    """Why a replica was given up."""
    moving_s: float
    """From the first bucket's arrival to the last's: what comes before is waiting for replicas to pause."""
    moved_bytes: int
    """In that time."""


class Sender:
    """Rank 0's buffers, made at the first update and kept: other processes may have mapped them.

    Args:
        device: where the weights are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its number, as NCCL wants it
        self._slots: list[Tensor] = []
        self._handles: list[dict[str, Any]] = []
        self._plan: tuple[tuple[int, ...], tuple[Bucket, ...], BucketSums] | None = None

    @property
    def gpu_uuid(self) -> str:
        """Names the GPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def prepare(self, specs: Sequence[weights_pb2.TensorSpec]) -> None:
        """Plan, and make the buffers, if that has not been done for tensors of these sizes."""
        sizes = tuple(spec.num_bytes for spec in specs)
        if self._plan is not None and self._plan[0] == sizes:
            return
        buckets = plan_buckets(sizes, BUCKET_BYTES)
        size = max(bucket.num_bytes for bucket in buckets)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(direct.NUM_SLOTS)]
        self._handles = []
        words = torch.empty(0, dtype=torch.int64, device=self.device)
        self._plan = (sizes, buckets, BucketSums(buckets, words))

    def handles(self) -> list[dict[str, Any]]:
        """Of the buffers, for processes on this GPU."""
        # Once for all updates: each export adds to what PyTorch keeps of a storage.
        self._handles = self._handles or [ipc_handle(slot) for slot in self._slots]
        return self._handles

    def send(self, tensors: Sequence[Tensor], gather: Gather, channels: Mapping[int, Channel]) -> Sent:
        """Send everything to every channel.

        Args:
            tensors: in the order of `prepare`.
            gather: makes some of them whole.
            channels: by replica; one that fails is aborted, and the others go on.
        """
        assert self._plan is not None
        _, buckets, planned_sums = self._plan
        live = _Live(channels)
        live.each(methodcaller("start", self._slots))
        sums = []
        since_s, moved_bytes = time.perf_counter(), sum(bucket.num_bytes for bucket in buckets)
        for index, bucket in enumerate(buckets):
            slot = index % len(self._slots)
            if index >= len(self._slots):
                live.each(methodcaller("wait", slot))
            if index == len(self._slots):  # the first bucket is there
                since_s, moved_bytes = time.perf_counter(), moved_bytes - buckets[0].num_bytes
            with gather([tensors[piece.tensor] for piece in bucket.pieces]):
                _pack(self._slots[slot], bucket, tensors)
            filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            filled.record()
            live.each(methodcaller("send", slot, bucket.num_bytes, filled))
            sums.append(planned_sums.of(index, self._slots[slot][: bucket.num_bytes].view(torch.int64)))
        for index in range(max(0, len(buckets) - len(self._slots)), len(buckets)):
            live.each(methodcaller("wait", index % len(self._slots)))
        moving_s = time.perf_counter() - since_s
        live.each(methodcaller("finish"))
        return Sent(torch.cat(sums).tolist(), live.errors, moving_s, moved_bytes)


class _Live:
    """Channels that have not failed."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self._channels = dict(channels)
        self.errors: dict[int, str] = {}

    def each(self, action: Callable[[Channel], None]) -> None:
        """Do something with every one; those that fail are aborted and left out from then on."""
        for replica, channel in list(self._channels.items()):
            try:
                action(channel)
            except (GaveUp, OSError, RuntimeError) as error:
                self.errors[replica] = str(error) or type(error).__name__
                channel.abort()
                del self._channels[replica]


def follow(tensors: Sequence[Tensor], specs: Sequence[weights_pb2.TensorSpec], gather: Gather) -> None:
    """What the other ranks do while rank 0 sends: take part in gathering."""
    for bucket in plan_buckets([spec.num_bytes for spec in specs], BUCKET_BYTES):
        with gather([tensors[piece.tensor] for piece in bucket.pieces]):
            pass


def _pack(buffer: Tensor, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
    """Copy a bucket's tensors into a buffer, the last row of each filled up with zeros."""
    for piece in bucket.pieces:
        end = piece.offset + piece.num_bytes
        if piece.num_bytes:
            source = tensors[piece.tensor].detach().reshape(-1)
            buffer[piece.offset : end].view(source.dtype).copy_(source)
        if padding := piece.num_rows * ROW_BYTES - piece.num_bytes:
            buffer[end : end + padding].zero_()
