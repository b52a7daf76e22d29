"""Weight manifest: describes one weight update to a replica; also the outcome that the update has on a replica."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deskrl.learner.policy.state_dict_names import unsharded_shape
from deskrl.proto.v1 import common_pb2, weights_pb2


@dataclass(frozen=True)
class WeightManifest:
    """Description of one update, sent to a replica before the weights and used to verify them afterwards."""

    version: common_pb2.PolicyVersion
    specs: tuple[weights_pb2.TensorSpec, ...]
    canary: weights_pb2.Canary
    canary_logprobs: tuple[float, ...]
    """Logprobs of the canary's continuation from the learner's own forward pass."""
    processor_hash: str

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True)
class WeightSnapshot:
    """Copy of the weights on the CPU, for streaming; its manifest includes the checksums of the tensors."""

    manifest: WeightManifest
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class PublishOutcome:
    """Outcome of one update of one replica."""

    replica: int
    """Index of the replica."""
    version: common_pb2.PolicyVersion
    ok: bool
    transfer: str
    """Transfer of the weights: `stream`, `ipc` or `nccl`."""
    error: str = ""
    canary_max_difference: float | None = None
    receive_ms: float = 0.0
    total_ms: float = 0.0
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    num_requests_kept: int = 0
    """Requests in progress that the replica paused and resumed."""
    late: bool = False
    """Whether the update was streamed in the background to a quarantined replica."""
    may_recover: bool = False
    """Whether the update failed because the replica was unreachable or went away."""


def with_checksums(manifest: WeightManifest, tensors: Mapping[str, Tensor]) -> WeightSnapshot:
    """Return a snapshot of tensors on the CPU whose manifest has the SHA-256 checksum of each tensor's bytes."""
    specs = tuple(
        weights_pb2.TensorSpec(
            name=spec.name,
            dtype=spec.dtype,
            shape=spec.shape,
            num_bytes=spec.num_bytes,
            checksum=hashlib.sha256(tensor_bytes(tensors[spec.name])).hexdigest(),
        )
        for spec in manifest.specs
    )
    return WeightSnapshot(replace(manifest, specs=specs), tensors)


def tensor_specs(tensors: Mapping[str, Tensor]) -> tuple[weights_pb2.TensorSpec, ...]:
    """Return the specs of tensors without checksums; sharded tensors are described as whole ones."""
    return tuple(
        weights_pb2.TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=unsharded_shape(tensor),
            num_bytes=torch.Size(unsharded_shape(tensor)).numel() * tensor.dtype.itemsize,
        )
        for name, tensor in tensors.items()
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the raw little-endian bytes of a CPU tensor without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
