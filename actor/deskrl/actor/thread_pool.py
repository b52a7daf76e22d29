"""Threads beside the event loop: a pool that works in forked processes too, and threads for which nothing waits."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


async def run_unawaited(function: Callable[[], _T]) -> _T:
    """Call a function in a thread of its own and return its result.

    If the caller is cancelled, the function continues, but neither the end of the event loop nor that of the process
    waits for it, unlike for `asyncio.to_thread`.
    """
    outcome: Future[_T] = Future()
    outcome.set_running_or_notify_cancel()

    def call() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="unawaited", daemon=True).start()
    return await asyncio.wrap_future(outcome)
