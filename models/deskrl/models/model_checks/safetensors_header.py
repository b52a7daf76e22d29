"""Header of a safetensors file: names, types and shapes of its tensors, checked against the size of the file.

Written by hand, because the library reads only whole files, names no cause, and is not installed on every machine.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from deskrl.core.errors import UserError
from deskrl.models.model_checks.placeholder_files import COPY_HINT, check_not_placeholder

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
_ITEM_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor in a header."""

    file: Path
    dtype: str
    """Type by its name in safetensors, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""
    num_bytes: int


class _Damaged(ValueError):
    """The header does not follow the format."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UserError: the file cannot be read, is a placeholder, is damaged, or is shorter or longer than its header says.
    """
    check_not_placeholder(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = file.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", COPY_HINT) from error
    if size == 0:
        raise UserError(f"{path}: empty", COPY_HINT)
    if length > _MAX_HEADER_BYTES or (header and not header.startswith(b"{")):
        raise UserError(f"{path}: not a safetensors file", COPY_HINT)
    if size < _LENGTH_BYTES + length:
        raise UserError(f"{path}: cut short within its header, after {size} bytes", COPY_HINT)
    try:
        tensors, num_bytes = _parse(path, header)
    except (_Damaged, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Damaged) else "it is not valid JSON"
        raise UserError(f"{path}: damaged header: {reason}", COPY_HINT) from error
    expected = _LENGTH_BYTES + length + num_bytes
    if size < expected:
        raise UserError(f"{path}: cut short: it has {size} of {expected} bytes", COPY_HINT)
    if size > expected:
        raise UserError(f"{path}: has {size - expected} bytes after its last tensor", COPY_HINT)
    return tensors


def _parse(path: Path, header: bytes) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors by name and the number of bytes that they take."""
    fields = json.loads(header, object_pairs_hook=_without_duplicates)
    if not isinstance(fields, dict):
        raise _Damaged("it is not a JSON object")
    fields.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, value in fields.items():
        tensor, start, end = _parse_tensor(path, name, value, _LENGTH_BYTES + len(header))
        tensors[name] = tensor
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise _Damaged(f"the bytes of tensor {_shown(name)} do not follow those of the tensor before it")
        position = end
    return tensors, position


def _parse_tensor(path: Path, name: str, value: Any, data_start: int) -> tuple[TensorInfo, int, int]:
    """Return a tensor and the start and end of its bytes, counted from `data_start` in the file."""
    entry = value if isinstance(value, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS or not _are_sizes(shape) or not _are_sizes(offsets):
        raise _Damaged(f"tensor {_shown(name)} has no valid type, shape or position")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _ITEM_BITS[dtype]:
        raise _Damaged(f"the number of bytes of tensor {_shown(name)} does not match its shape")
    start, end = offsets
    return TensorInfo(path, dtype, tuple(shape), data_start + start, end - start), start, end


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a list of integers from 0 to 2^63."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Damaged("a name occurs twice")
    return fields


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])
