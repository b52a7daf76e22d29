"""Threads of modules in processes that were forked from one that has used them."""

from __future__ import annotations

import asyncio
import multiprocessing

from deskrl.actor.thread_pool import ThreadPool

_threads = ThreadPool(1, "test")


def use() -> None:
    async def call() -> int:
        async with asyncio.timeout(10.0):
            return await _threads.run(lambda: 1)

    assert asyncio.run(call()) == 1


def test_a_forked_process_has_threads_although_its_parent_used_the_pool() -> None:
    use()
    child = multiprocessing.get_context("fork").Process(target=use)
    child.start()
    child.join()
    assert child.exitcode == 0
