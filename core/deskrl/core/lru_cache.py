"""LRU cache bounded in bytes that several threads may share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cachetools import LRUCache

T = TypeVar("T")


class SharedLRUCache(LRUCache[str, T]):
    """`cachetools.LRUCache` with a lock around `get` and item assignment.

    Unlike its base class it ignores a value that is larger than the whole cache instead of raising ValueError.

    Args:
        max_bytes: maximum total size of the values.
        num_bytes: function that returns the size of a value in bytes.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[T], int]) -> None:
        super().__init__(max_bytes, num_bytes)
        self._lock = threading.RLock()

    def get(self, key: str, default: T | None = None) -> T | None:  # type: ignore[override]
        """Return the value of a key, or the default if the cache does not hold it."""
        with self._lock:
            return super().get(key, default)

    def __setitem__(self, key: str, value: T) -> None:
        """Store a value and evict the least recently used ones to make room for it."""
        if self.getsizeof(value) <= self.maxsize:
            with self._lock:
                super().__setitem__(key, value)
