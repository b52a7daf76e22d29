"""Writer thread with group commit: runs operations in order, and commits all that are queued in one transaction.

An operation is a function of the connection. Its future resolves once its effects are on disk, so that an
acknowledgement sent afterwards is durable.
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

from deskrl.replay.row_checksums import is_row_damage
from deskrl.replay.schema import is_full_disk
from deskrl.replay.status_errors import StatusError, StoreFullError

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

_log = logging.getLogger(__name__)

_MAX_COMMIT_OPERATIONS = 256
_DISK_FULL_LOG_PERIOD_S = 60.0


@dataclass(frozen=True)
class Commit:
    """Size and duration of one transaction, for metrics."""

    num_operations: int
    duration_s: float


@dataclass
class _QueuedOperation:
    operation: Operation[Any]
    future: Future[Any]
    outcome: Any = None
    error: StatusError | None = None


class Writer:
    """Owner of the writing connection and its thread."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        before_commit: Operation[None],
        after_commit: Callable[[Commit], None],
        after_rollback: Callable[[], None],
        repair: Operation[bool] = lambda connection: False,
        on_failure: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        """Start the thread, in which all callbacks are called.

        Args:
            connection: connection in autocommit mode; `close` closes it.
            before_commit: last operation of every transaction.
            after_commit: called after each commit.
            after_rollback: called after each transaction that was rolled back.
            repair: called if an operation meets a damaged row; returns whether to run the operation again.
            on_failure: called with the unexpected error of a transaction, and returns the error for its operations.
        """
        self._connection = connection
        self._before_commit = before_commit
        self._after_commit = after_commit
        self._after_rollback = after_rollback
        self._repair = repair
        self._on_failure = on_failure
        self._entries: queue.SimpleQueue[_QueuedOperation | None] = queue.SimpleQueue()
        self._disk_full_logged_s = -math.inf
        self._thread = threading.Thread(target=self._serve, name="replay-writer")
        self._thread.start()

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue an operation, which runs after all that were queued before it."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # it can no longer be cancelled
        self._entries.put(_QueuedOperation(operation, future))
        return future

    async def run(self, operation: Operation[T]) -> T:
        """Queue an operation and wait until it is on disk. It runs even if the waiter is cancelled."""
        return await asyncio.wrap_future(self.submit(operation))

    def close(self) -> None:
        """Run all queued operations, then close the database."""
        self._entries.put(None)
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        while entries := self._next_batch():
            self._commit(entries)

    def _next_batch(self) -> list[_QueuedOperation]:
        """Wait for an operation and return it with all that are queued; empty after `close`."""
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

    def _commit(self, entries: list[_QueuedOperation]) -> None:
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
            if entry.error is not None:
                entry.future.set_exception(entry.error)
            else:
                entry.future.set_result(entry.outcome)

    def _apply(self, entry: _QueuedOperation) -> None:
        """Run one operation. If it raises StatusError it has no effect, and the others are not affected."""
        self._connection.execute("SAVEPOINT operation")
        try:
            try:
                entry.outcome = entry.operation(self._connection)
            except sqlite3.OperationalError as error:
                if not is_row_damage(error):
                    raise
                self._connection.execute("ROLLBACK TO operation")
                if not self._repair(self._connection):
                    raise
                self._connection.execute("RELEASE operation")  # keeps the repair, whatever becomes of the operation
                self._connection.execute("SAVEPOINT operation")
                entry.outcome = entry.operation(self._connection)
        except StatusError as error:
            entry.error = error
            self._connection.execute("ROLLBACK TO operation")
        self._connection.execute("RELEASE operation")

    def _fail(self, entries: list[_QueuedOperation], error: Exception) -> None:
        """Roll the transaction back, and fail all of its operations."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._after_rollback()
        if is_full_disk(error):
            self._log_disk_full(error)
            error = StoreFullError(
                "the disk of the replay store is full: free some space (nothing acknowledged is lost)"
            )
        else:
            error = self._on_failure(error)
            if not isinstance(error, StatusError):
                _log.error("transaction failed", exc_info=error)
        for entry in entries:
            entry.future.set_exception(error)

    def _log_disk_full(self, error: Exception) -> None:
        """Log at most once per period: small writes may still succeed, so the end of the condition is unknown."""
        now_s = time.monotonic()
        if now_s - self._disk_full_logged_s >= _DISK_FULL_LOG_PERIOD_S:
            self._disk_full_logged_s = now_s
            _log.error("the disk is full: writes are rejected until there is space (%s)", error)
