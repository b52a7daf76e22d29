"""The one thread that writes: runs operations in order and commits as many of them together as have come in meanwhile.

Knows SQLite and nothing of what is written. An operation is a function of the connection; its future resolves only
once its effects are on disk, so whoever acknowledges after it acknowledges what is durable.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from deskrl.replay.refusals import Refused, StoreFull
from deskrl.replay.schema import is_full_disk

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

_log = logging.getLogger("deskrl.replay")

_MAX_COMMIT_OPERATIONS = 256
_FULL_REPORT_PERIOD_S = 60.0


@dataclass(frozen=True)
class Commit:
    """One transaction as it went, for metrics."""

    num_operations: int
    duration_s: float


@dataclass
class _Entry:
    operation: Operation[Any]
    future: Future[Any]
    outcome: Any = None
    refusal: Refused | None = None


class Writer:
    """Owns the writing connection and its thread."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        before_commit: Operation[None],
        after_commit: Callable[[Commit], None],
        after_rollback: Callable[[], None],
    ) -> None:
        """Start the thread, in which all of these are called.

        Args:
            connection: in autocommit mode; closed by `close`.
            before_commit: the last operation of every transaction.
            after_commit: called after each commit.
            after_rollback: called after each transaction that came to nothing.
        """
        self._connection = connection
        self._before_commit = before_commit
        self._after_commit = after_commit
        self._after_rollback = after_rollback
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._full_reported_s = -math.inf
        self._thread = threading.Thread(target=self._serve, name="replay-writer")
        self._thread.start()

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue an operation; it runs after all that were queued before it."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._entries.put(_Entry(operation, future))
        return future

    async def run(self, operation: Operation[T]) -> T:
        """Queue an operation and wait until it is on disk. Once queued it runs, even if the waiter is cancelled."""
        return await asyncio.wrap_future(self.submit(operation))

    def close(self) -> None:
        """Finish what is queued, then close the database."""
        self._entries.put(None)
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        while entries := self._next_entries():
            self._commit(entries)

    def _next_entries(self) -> list[_Entry]:
        """What one transaction takes: everything queued by now, after waiting for the first; empty at the end."""
        first = self._entries.get()
        if first is None:
            return []
        entries = [first]
        while len(entries) < _MAX_COMMIT_OPERATIONS:
            try:
                entry = self._entries.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                self._entries.put(None)
                break
            entries.append(entry)
        return entries

    def _commit(self, entries: list[_Entry]) -> None:
        start_s = time.perf_counter()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for entry in entries:
                self._apply(entry)
            self._before_commit(self._connection)
            self._connection.execute("COMMIT")
        except Exception as error:
            self._fail(entries, error)
            return
        self._after_commit(Commit(len(entries), time.perf_counter() - start_s))
        for entry in entries:
            if entry.refusal is not None:
                entry.future.set_exception(entry.refusal)
            else:
                entry.future.set_result(entry.outcome)

    def _apply(self, entry: _Entry) -> None:
        """Run one operation; a refused one leaves no trace and does not disturb the others."""
        self._connection.execute("SAVEPOINT operation")
        try:
            entry.outcome = entry.operation(self._connection)
        except Refused as refusal:
            entry.refusal = refusal
            self._connection.execute("ROLLBACK TO operation")
        self._connection.execute("RELEASE operation")

    def _fail(self, entries: list[_Entry], error: Exception) -> None:
        """Nothing of these entries is kept, and each is told why."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._after_rollback()
        if is_full_disk(error):
            self._report_full(error)
            error = StoreFull("the replay store's disk is full; free some space, nothing acknowledged is lost")
        else:
            _log.exception("a transaction failed")
        for entry in entries:
            entry.future.set_exception(error)

    def _report_full(self, error: Exception) -> None:
        """Say it once in a while: small writes may still fit in between, so nothing marks the end of it."""
        now_s = time.monotonic()
        if now_s - self._full_reported_s >= _FULL_REPORT_PERIOD_S:
            self._full_reported_s = now_s
            _log.error("the disk is full: what does not fit is refused until there is space (%s)", error)
