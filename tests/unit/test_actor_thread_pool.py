"""Threads of modules in processes that were forked from one that has used them."""

from __future__ import annotations

import subprocess
import sys


def test_a_forked_process_has_threads_although_its_parent_used_the_pool() -> None:
    program = """
import asyncio, os
from deskrl.actor.thread_pool import ThreadPool

threads = ThreadPool(1, "test")

async def use():
    async with asyncio.timeout(10.0):
        return await threads.run(lambda: 1)

print(asyncio.run(use()), flush=True)
child = os.fork()
if child == 0:
    print(asyncio.run(use()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    # In a process of its own: other tests leave threads behind, and a fork of a process that has them can hang.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["1", "1"]
