"""Staging of a weight update: checks the announced tensors and collects their verified bytes in a safetensors file.

The file is anonymous and in memory. Workers on the same machine open it by its /proc path; it disappears when this
process ends.
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
from deskrl.core.file_io import read_json_object
from deskrl.proto.v1 import weights_pb2

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Prefixes of the tensors of the vision tower, in old and new checkpoints.
_VISION_PREFIXES = ("visual.", "model.visual.")


class UpdateRejected(ValueError):
    """The update does not match the model, or the received bytes do not match the announcement."""


def checkpoint_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model folder's tensors by name, from the headers of its safetensors files.

    An output head that is tied to the embeddings is left out: it is not a tensor of its own.

    Raises:
        UserError: there are no safetensors files, or one is not readable.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}", "copy it again") from error
    if read_json_object(model_folder / "config.json", "copy it again").get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    if not shapes:
        raise UserError(f"{model_folder}: contains no *.safetensors", "specify a model folder with its weights")
    return shapes


def check_announcement(tensors: Sequence[weights_pb2.TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UpdateRejected unless `tensors` are exactly those of the model, whose shapes are `shapes`."""
    announced = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    if len(announced) != len(tensors):
        raise UpdateRejected("duplicate tensor in the announcement")
    missing, unknown = sorted(shapes.keys() - announced.keys()), sorted(announced.keys() - shapes.keys())
    if missing or unknown:
        raise UpdateRejected(f"tensors differ from those of the model: missing {missing[:3]}, unknown {unknown[:3]}")
    for tensor in tensors:
        if announced[tensor.name] != tuple(shapes[tensor.name]):
            expected = shapes[tensor.name]
            raise UpdateRejected(f"{tensor.name}: has shape {announced[tensor.name]}, the model expects {expected}")
        if tensor.dtype not in _ITEM_BYTES:
            raise UpdateRejected(f"{tensor.name}: has the unknown dtype {tensor.dtype!r}")
        if tensor.num_bytes != math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise UpdateRejected(f"{tensor.name}: {tensor.num_bytes} bytes do not match its shape and dtype")


def vision_changed(old: Mapping[str, str] | None, new: Mapping[str, str]) -> bool:
    """Return whether a tensor of the vision tower has changed.

    Args:
        old: checksums of the last update by name; None if there was none.
        new: checksums of this update.
    """
    vision = ((name, checksum) for name, checksum in new.items() if name.startswith(_VISION_PREFIXES))
    return old is None or any(old.get(name) != checksum for name, checksum in vision)


def mismatched_tensors(names: Sequence[str], sent: Sequence[int], received: Sequence[int]) -> list[str]:
    """Return the names of tensors whose checksums differ; all names if a checksum is missing."""
    if not len(names) == len(sent) == len(received):
        return list(names)
    return [name for name, one, other in zip(names, sent, received, strict=True) if one != other]


@dataclass(frozen=True)
class TransferResult:
    """Result of a direct transfer."""

    checksums: Sequence[int]
    """Checksum of each received tensor; empty after an error."""
    error: str
    """Error message; empty on success."""
    is_model_modified: bool
    """Whether a bucket was loaded into the model."""


def merge_results(workers: Sequence[Mapping[str, Any]]) -> TransferResult:
    """Merge the results of all workers of an engine, which are sent the same buckets."""
    errors = [worker["error"] for worker in workers if "error" in worker]
    is_model_modified = any(worker["num_loaded"] for worker in workers)
    if errors:
        return TransferResult((), "; ".join(errors), is_model_modified)
    checksums = [worker["checksums"] for worker in workers]
    if any(other != checksums[0] for other in checksums):
        return TransferResult((), "the workers of the engine received different bytes", is_model_modified)
    return TransferResult(checksums[0], "", is_model_modified)


@dataclass
class _PendingTensor:
    """Tensor whose bytes are being received."""

    spec: weights_pb2.TensorSpec
    num_missing: int
    digest: hashlib._Hash


class StagingFile:
    """Safetensors file in memory that is written chunk by chunk; each tensor is verified once it is complete.

    Written by hand, because the safetensors library writes complete tensors only.
    """

    def __init__(self, tensors: Sequence[weights_pb2.TensorSpec]) -> None:
        """Create the file and write its header.

        Args:
            tensors: announced tensors, checked by `check_announcement`, in the order of their bytes.
        """
        self._descriptor = os.memfd_create("deskrl-weights")
        self._file = os.fdopen(self._descriptor, "wb")
        self._tensors = iter(tensors)
        self._current: _PendingTensor | None = None
        header, offset = {}, 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        self._file.write(struct.pack("<Q", len(text)) + text)
        self.num_bytes = offset
        self._advance()

    @property
    def path(self) -> str:
        """Path by which other processes of this user on this machine can open the file."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, chunk: bytes) -> None:
        """Append the next bytes.

        Raises:
            UpdateRejected: a checksum differs, or there are more bytes than announced.
        """
        self._file.write(chunk)
        rest = memoryview(chunk)
        while len(rest):
            if self._current is None:
                raise UpdateRejected(f"{len(rest)} bytes more than announced")
            part = rest[: self._current.num_missing]
            self._current.digest.update(part)
            self._current.num_missing -= len(part)
            rest = rest[len(part) :]
            if self._current.num_missing == 0:
                if self._current.digest.hexdigest() != self._current.spec.checksum:
                    raise UpdateRejected(f"{self._current.spec.name}: the checksum differs")
                self._advance()
        if self._current is None:
            self._file.flush()

    def _advance(self) -> None:
        """Continue with the next tensor that is not empty."""
        self._current = None
        for spec in self._tensors:
            if spec.num_bytes:
                self._current = _PendingTensor(spec, spec.num_bytes, hashlib.sha256())
                return

    def close(self) -> None:
        """Free the memory."""
        self._file.close()
