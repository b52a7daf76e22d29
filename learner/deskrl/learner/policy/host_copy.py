"""Copies of tensors in the host's memory, taken fast enough to hold learning up for seconds and not for a minute.

Two things take long: touching new memory, and the driver's own way from a GPU into memory that is not pinned. So the
memory is kept for the next copies, and threads bring chunks over through pinned memory of their own. Knows tensors and
memory; knows nothing of what the values mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_NUM_THREADS = 8
_CHUNK_BYTES = 64 * 1024**2
"""A thread has as much pinned memory."""


class HostCopier:
    """Copies tensors, into the same memory each time."""

    def __init__(self) -> None:
        self._used: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = {}
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="copy")
        self._bring = _bringer()

    @property
    def kept_bytes(self) -> int:
        """Memory that it holds and that no copy is in."""
        return sum(buffer.nbytes for buffers in self._free.values() for buffer in buffers)

    def begin(self) -> None:
        """Have the next copies overwrite those that were made since the last call."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.nbytes, []).append(buffer)
        self._used = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors, contiguous."""
        flat = [tensor.detach().contiguous().reshape(-1) for tensor in tensors]
        buffers = [self._buffer(tensor.nbytes) for tensor in flat]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # threads have streams of their own
        chunks = [
            (source.view(torch.uint8)[start : start + _CHUNK_BYTES], buffer[start : start + _CHUNK_BYTES])
            for source, buffer in zip(flat, buffers, strict=True)
            for start in range(0, buffer.nbytes, _CHUNK_BYTES)
        ]
        for _ in self._pool.map(lambda chunk: self._bring(*chunk), chunks):
            pass
        return [buffer.view(tensor.dtype).view(tensor.shape) for tensor, buffer in zip(tensors, buffers, strict=True)]

    def _buffer(self, num_bytes: int) -> Tensor:
        """One of that size that is free, or a new one."""
        fitting = self._free.get(num_bytes)
        self._used.append(fitting.pop() if fitting else torch.empty(num_bytes, dtype=torch.uint8))
        return self._used[-1]


def _bringer() -> Callable[[Tensor, Tensor], None]:
    """Brings a chunk of bytes to the host; each thread that calls it has a stream and pinned memory of its own."""
    local = threading.local()

    def bring(source: Tensor, target: Tensor) -> None:
        if source.device.type != "cuda":
            target.copy_(source)
            return
        if not hasattr(local, "stream"):
            local.stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
            local.pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        pinned = local.pinned[: source.nbytes]
        with torch.cuda.stream(local.stream):
            pinned.copy_(source, non_blocking=True)
        local.stream.synchronize()
        target.copy_(pinned)

    return bring
