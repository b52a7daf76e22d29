"""A cache with room for so many bytes: the least recently used go first. Knows nothing of what it keeps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteCache(Generic[T]):
    """Values by a name that never stands for another one, as a screenshot's hash. Safe to share between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> T | None:
        """The value of this name, or None if it is not (or no longer) here."""
        with self._lock:
            if name not in self._entries:
                return None
            self._entries.move_to_end(name)
            return self._entries[name][0]

    def put(self, name: str, value: T, num_bytes: int) -> None:
        """Keep a value of so many bytes, at the price of older ones; one that is here already stays as it is."""
        with self._lock:
            if name not in self._entries:
                self._entries[name] = value, num_bytes
                self.num_bytes += num_bytes
            self._entries.move_to_end(name)
            while self.num_bytes > self._max_bytes:
                _, (_, evicted_bytes) = self._entries.popitem(last=False)
                self.num_bytes -= evicted_bytes
