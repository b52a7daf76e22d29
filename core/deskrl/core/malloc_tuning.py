"""malloc settings for processes that allocate and free large buffers at a high rate."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 256 * 1024**2
_LARGEST_BYTES = 32 * 1024**2
"""Largest threshold that glibc accepts."""


def keep_freed_memory() -> None:
    """Keep up to 256 MiB of freed memory for reuse instead of returning it to the kernel; no effect without glibc.

    Forwarding a screenshot allocates and frees several hundred kilobytes per copy. By default glibc returns such a
    block to the kernel, which zeroes its pages for the next allocation. Measured with tests/bench/replay_store.py,
    keeping the memory makes reads a third and writes 5 % faster.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def use_one_arena() -> None:
    """Let all threads allocate from one heap; no effect without glibc.

    `return_freed_memory` cannot return the end of the heaps that glibc creates for further threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Collect unreachable objects and return all freed memory to the kernel, even if `keep_freed_memory` keeps it.

    A failed call leaves a cycle of its error, traceback and frames, which hold the request. The garbage collector runs
    by the number of objects, not by their size, so that such requests would stay for hours.
    """
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
