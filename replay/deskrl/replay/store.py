"""The store as the service uses it: one writer with group commit, readers beside it, retention in every commit.

What a commit names is on disk before it: first the screenshots' segments, then the database's log.

Knows how operations reach the database, and nothing of what they do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from deskrl.replay import images, retention, schema
from deskrl.replay.segments import Segments
from deskrl.replay.writer import Commit, Operation, T, Writer

_log = logging.getLogger("deskrl.replay")

_NUM_READERS = 4


class Store:
    """The durable store of one run. One process at a time holds it."""

    def __init__(
        self, folder: Path, max_bytes: int, after_commit: Callable[[Commit], None] = lambda commit: None
    ) -> None:
        """Open it, or make it.

        Args:
            folder: the run's replay folder.
            max_bytes: size above which consumed episodes are removed.
            after_commit: called after each commit, in the writer's thread.

        Raises:
            UserError: another process holds it, or a file of it is damaged or not ours.
        """
        self.path = folder.absolute() / schema.FILE_NAME
        self._max_bytes = max_bytes
        self._lock = schema.lock_folder(folder)
        try:
            connection = schema.open_database(self.path)
            self.segments = Segments(self.path.parent, images.extents(connection), max_bytes)
        except BaseException:
            os.close(self._lock)
            raise
        self._is_over = False
        self._given_up: list[int] = []
        self._after_commit = after_commit
        self._writer = Writer(connection, self._before_commit, self._committed, self.segments.roll_back)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="replay-reader")
        self._of_thread = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue a write; its future resolves once it is on disk."""
        return self._writer.submit(operation)

    async def write(self, operation: Operation[T]) -> T:
        """Write, and wait until it is on disk. Once queued it happens, even if the waiter is cancelled."""
        return await self._writer.run(operation)

    async def read(self, operation: Operation[T]) -> T:
        """Read what is committed by now, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, operation)

    def close(self) -> None:
        """Finish the writes that are queued, and let go of the files."""
        self._readers.shutdown()
        for connection in self._reader_connections:
            connection.close()
        self._writer.close()
        self.segments.close()
        os.close(self._lock)

    def _read(self, operation: Operation[T]) -> T:
        connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
        if connection is None:
            connection = self._of_thread.connection = schema.open_reader(self.path)
            self._reader_connections.append(connection)
        return operation(connection)

    def _before_commit(self, connection: sqlite3.Connection) -> None:
        self._retain(connection)
        self._given_up = retention.give_up_segments(connection, self.segments)
        self.segments.sync()

    def _committed(self, commit: Commit) -> None:
        self.segments.commit()
        self.segments.remove(self._given_up)
        self._after_commit(commit)

    def _retain(self, connection: sqlite3.Connection) -> None:
        """Keep to `max_bytes`, a few episodes at a time; say once when nothing more may go."""
        num_removed = retention.remove_oldest(connection, self._max_bytes)
        is_over = num_removed == 0 and retention.used_bytes(connection) > self._max_bytes
        if is_over and not self._is_over:
            _log.warning("the store is over replay.max_bytes (%d) and holds nothing that may go", self._max_bytes)
        self._is_over = is_over
