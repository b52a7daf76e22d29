"""The receiving end of a weight update: announced tensors in, a proven safetensors file out.

Knows the announcement, the bytes and where they lie; knows no engine and no stream. Bytes go into an anonymous file in
memory, which workers of the same machine open by its /proc path and which is gone with this process, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core.errors import UserError
from deskrl.proto.v1 import weights_pb2

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# How the vision tower's tensors are called in checkpoints, old and new.
_VISION_PREFIXES = ("visual.", "model.visual.")


class UpdateRefused(ValueError):
    """An update that is not for this model, or did not arrive as announced. Nothing was touched."""


def checkpoint_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model folder's tensors, from the headers of its safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(header_bytes))
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path}: not readable as safetensors: {error}", "copy it anew") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise UserError(f"{model_folder} holds no *.safetensors", "name a model folder with its weights")
    return shapes


def check_announcement(tensors: Sequence[weights_pb2.TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UpdateRefused unless `tensors` are exactly those of the model."""
    announced = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    if len(announced) != len(tensors):
        raise UpdateRefused("a tensor is announced twice")
    missing, unknown = sorted(shapes.keys() - announced.keys()), sorted(announced.keys() - shapes.keys())
    if missing or unknown:
        raise UpdateRefused(f"other tensors than the model's: missing {missing[:3]}, unknown {unknown[:3]}")
    for tensor in tensors:
        if announced[tensor.name] != tuple(shapes[tensor.name]):
            raise UpdateRefused(f"{tensor.name} has shape {announced[tensor.name]}, the model {shapes[tensor.name]}")
        if tensor.dtype not in _ITEM_BYTES:
            raise UpdateRefused(f"{tensor.name} has the unknown dtype {tensor.dtype!r}")
        if tensor.num_bytes != math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise UpdateRefused(f"{tensor.name} announces {tensor.num_bytes} bytes, which is not its shape and dtype")


def vision_changed(old: Mapping[str, str] | None, new: Mapping[str, str]) -> bool:
    """Whether a tensor of the vision tower differs from the checksums of the last update (None: there was none)."""
    vision = ((name, checksum) for name, checksum in new.items() if name.startswith(_VISION_PREFIXES))
    return old is None or any(old.get(name) != checksum for name, checksum in vision)


def differing(names: Sequence[str], sent: Sequence[int], received: Sequence[int]) -> list[str]:
    """Tensors whose checksum as received is not that which was sent, or that lack one."""
    if not len(names) == len(sent) == len(received):
        return list(names)
    return [name for name, one, other in zip(names, sent, received, strict=True) if one != other]


@dataclass(frozen=True)
class Received:
    """What became of a direct transfer."""

    checksums: Sequence[int]
    """Of each tensor as it arrived; empty if not all came."""
    error: str
    touched: bool
    """Whether a bucket got as far as the model."""


def merge_received(workers: Sequence[Mapping[str, Any]]) -> Received:
    """One account of what all workers of an engine say, each of which was sent the same."""
    errors = [worker["error"] for worker in workers if "error" in worker]
    touched = any(worker["placed"] for worker in workers)
    if errors:
        return Received((), "; ".join(errors), touched)
    checksums = [worker["checksums"] for worker in workers]
    if any(other != checksums[0] for other in checksums):
        return Received((), "the workers of the engine received different bytes", touched)
    return Received(checksums[0], "", touched)


@dataclass
class _Expected:
    """The tensor whose bytes come next."""

    spec: weights_pb2.TensorSpec
    num_missing: int
    digest: hashlib._Hash


class WeightFile:
    """A safetensors file in memory that fills as chunks come in; each tensor is checked once it is whole."""

    def __init__(self, tensors: Sequence[weights_pb2.TensorSpec]) -> None:
        """Write the header.

        Args:
            tensors: as announced, checked by `check_announcement`; their bytes follow in this order.
        """
        self._descriptor = os.memfd_create("deskrl-weights")
        self._file = os.fdopen(self._descriptor, "wb")
        self._tensors = iter(tensors)
        self._current: _Expected | None = None
        header, offset = {}, 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _SAFETENSORS_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
        self._file.write(struct.pack("<Q", len(text)) + text)
        self.num_bytes = offset
        self._next()

    @property
    def path(self) -> str:
        """Where other processes of this user on this machine open the file."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            UpdateRefused: a checksum differs, or there are more bytes than announced.
        """
        self._file.write(chunk)
        rest = memoryview(chunk)
        while len(rest):
            if self._current is None:
                raise UpdateRefused(f"{len(rest)} bytes more than announced")
            part = rest[: self._current.num_missing]
            self._current.digest.update(part)
            self._current.num_missing -= len(part)
            rest = rest[len(part) :]
            if self._current.num_missing == 0:
                if self._current.digest.hexdigest() != self._current.spec.checksum:
                    raise UpdateRefused(f"the checksum of {self._current.spec.name} differs")
                self._next()
        if self._current is None:
            self._file.flush()

    def _next(self) -> None:
        """Expect the next tensor that has bytes."""
        self._current = None
        for spec in self._tensors:
            if spec.num_bytes:
                self._current = _Expected(spec, spec.num_bytes, hashlib.sha256())
                return

    def close(self) -> None:
        """Give the memory back."""
        self._file.close()
