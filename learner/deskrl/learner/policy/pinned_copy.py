"""Pinned copies: copies tensors from the GPU to host memory through pinned buffers, within seconds for large models.

Two steps are slow: the first access to newly allocated memory, and the driver's transfer from a GPU to unpinned memory.
Therefore the memory of earlier copies is reused, and threads transfer chunks through pinned buffers of their own.
The staging of `torch.distributed.checkpoint` either pins a whole copy of the state or copies to unpinned memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_NUM_THREADS = 8
_CHUNK_BYTES = 64 * 1024**2
"""Size of a chunk, and of each thread's pinned buffer."""


class PinnedCopier:
    """Copies tensors to host memory, reusing the same memory for each set of copies."""

    def __init__(self) -> None:
        self._used: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = {}
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="copy")
        self._copy_chunk = _make_chunk_copier()

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept for reuse and holds no copy, in bytes."""
        return sum(buffer.nbytes for buffers in self._free.values() for buffer in buffers)

    def begin(self) -> None:
        """Begin a new set of copies, which overwrites the previous set."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.nbytes, []).append(buffer)
        self._used = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return contiguous copies of tensors in host memory."""
        flat = [tensor.detach().contiguous().reshape(-1) for tensor in tensors]
        buffers = [self._buffer(tensor.nbytes) for tensor in flat]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the threads use other streams than the one that computes the tensors
        chunks = [
            (source.view(torch.uint8)[start : start + _CHUNK_BYTES], buffer[start : start + _CHUNK_BYTES])
            for source, buffer in zip(flat, buffers, strict=True)
            for start in range(0, buffer.nbytes, _CHUNK_BYTES)
        ]
        for _ in self._pool.map(lambda chunk: self._copy_chunk(*chunk), chunks):
            pass
        return [buffer.view(tensor.dtype).view(tensor.shape) for tensor, buffer in zip(tensors, buffers, strict=True)]

    def _buffer(self, num_bytes: int) -> Tensor:
        """Return a free buffer of this size, or a new one."""
        fitting = self._free.get(num_bytes)
        self._used.append(fitting.pop() if fitting else torch.empty(num_bytes, dtype=torch.uint8))
        return self._used[-1]


def _make_chunk_copier() -> Callable[[Tensor, Tensor], None]:
    """Return a function that copies a chunk of bytes to the host; each calling thread has its own stream and buffer."""
    local = threading.local()

    def copy_chunk(source: Tensor, target: Tensor) -> None:
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

    return copy_chunk
