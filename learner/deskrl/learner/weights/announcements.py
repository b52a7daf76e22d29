"""What is said of an update of the weights: to a replica beforehand, and of a replica afterwards.

Knows tensors and their checksums; knows neither streams nor channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deskrl.learner.policy.checkpoint_names import whole_shape
from deskrl.proto.v1 import common_pb2, weights_pb2


@dataclass(frozen=True)
class Announcement:
    """What a replica is told of an update beforehand, and judged by afterwards."""

    version: common_pb2.PolicyVersion
    specs: tuple[weights_pb2.TensorSpec, ...]
    canary: weights_pb2.Canary
    canary_logprobs: tuple[float, ...]
    """Of the learner's own forward pass."""
    processor_hash: str

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True)
class Snapshot:
    """Weights as they are streamed: announced with their checksums, and here on the CPU."""

    announcement: Announcement
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of one update of one replica."""

    replica: int
    version: common_pb2.PolicyVersion
    ok: bool
    transfer: str
    """How the weights went: `stream`, `ipc` or `nccl`."""
    error: str = ""
    canary_max_difference: float | None = None
    receive_ms: float = 0.0
    total_ms: float = 0.0
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    num_requests_kept: int = 0
    late: bool = False
    """Brought by the catching-up thread."""
    may_recover: bool = False
    """It failed because the replica could not be reached, or went away."""


def with_checksums(announcement: Announcement, tensors: Mapping[str, Tensor]) -> Snapshot:
    """A snapshot of tensors on the CPU, each with the checksum of its bytes."""
    specs = tuple(
        weights_pb2.TensorSpec(
            name=spec.name,
            dtype=spec.dtype,
            shape=spec.shape,
            num_bytes=spec.num_bytes,
            checksum=hashlib.sha256(bytes_of(tensors[spec.name])).hexdigest(),
        )
        for spec in announcement.specs
    )
    return Snapshot(replace(announcement, specs=specs), tensors)


def describe(tensors: Mapping[str, Tensor]) -> tuple[weights_pb2.TensorSpec, ...]:
    """What is announced of tensors, checksums excepted; of those that are sharded, the whole."""
    return tuple(
        weights_pb2.TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=whole_shape(tensor),
            num_bytes=torch.Size(whole_shape(tensor)).numel() * tensor.dtype.itemsize,
        )
        for name, tensor in tensors.items()
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's raw little-endian bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
