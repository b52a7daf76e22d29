"""Thread pool of a module that also works in processes forked from one that has used it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class ThreadPool:
    """Threads beside the event loop. A forked process has none of its parent's threads, and gets its own.

    Args:
        num_threads: largest number of threads.
        name: prefix of the threads' names.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._create()
        os.register_at_fork(after_in_child=self._create)

    async def run(self, function: Callable[[], _T]) -> _T:
        """Call a function in a thread and return its result. If the caller is cancelled, the function continues."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def _create(self) -> None:
        self._executor = ThreadPoolExecutor(self._num_threads, thread_name_prefix=self._name)
