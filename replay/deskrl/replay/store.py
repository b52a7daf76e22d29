"""Durable store of one run: one writer with group commit, concurrent readers, and retention in every commit.

The blob log is synced before the database commits, so that a committed row never names bytes that are not on disk.
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

from deskrl.replay import image_index, retention, schema
from deskrl.replay.blob_log import BlobLog
from deskrl.replay.writer import Commit, Operation, T, Writer

_log = logging.getLogger(__name__)

_NUM_READERS = 4


class Store:
    """Durable store of one run, held by one process at a time."""

    def __init__(
        self, store_dir: Path, max_bytes: int, after_commit: Callable[[Commit], None] = lambda commit: None
    ) -> None:
        """Open the store, or create it.

        Args:
            store_dir: replay directory of the run.
            max_bytes: size in bytes above which consumed episodes are removed.
            after_commit: called after each commit, in the writer's thread.

        Raises:
            UserError: another process holds it, or a file is damaged, or not written by a compatible deskrl.
        """
        self.path = store_dir.absolute() / schema.FILE_NAME
        self._max_bytes = max_bytes
        self._lock = schema.lock_store(store_dir)
        try:
            connection = schema.open_database(self.path)
            self.blob_log = BlobLog(self.path.parent, image_index.segment_sizes(connection), max_bytes)
        except BaseException:
            os.close(self._lock)
            raise
        self._is_over_limit = False
        self._unused_segments: list[int] = []
        self._after_commit = after_commit
        self._writer = Writer(connection, self._before_commit, self._committed, self.blob_log.roll_back)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="replay-reader")
        self._thread_local = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue a write; the future resolves once it is on disk."""
        return self._writer.submit(operation)

    async def write(self, operation: Operation[T]) -> T:
        """Write, and wait until it is on disk. The write is done even if the waiter is cancelled."""
        return await self._writer.run(operation)

    async def read(self, operation: Operation[T]) -> T:
        """Run a read of committed data in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, operation)

    def close(self) -> None:
        """Finish all queued writes, and close the files."""
        self._readers.shutdown()
        for connection in self._reader_connections:
            connection.close()
        self._writer.close()
        self.blob_log.close()
        os.close(self._lock)

    def _read(self, operation: Operation[T]) -> T:
        connection: sqlite3.Connection | None = getattr(self._thread_local, "connection", None)
        if connection is None:
            connection = self._thread_local.connection = schema.open_reader(self.path)
            self._reader_connections.append(connection)
        return operation(connection)

    def _before_commit(self, connection: sqlite3.Connection) -> None:
        self._retain(connection)
        self._unused_segments = retention.compact_segments(connection, self.blob_log)
        self.blob_log.sync()

    def _committed(self, commit: Commit) -> None:
        self.blob_log.commit()
        self.blob_log.remove(self._unused_segments)
        self._after_commit(commit)

    def _retain(self, connection: sqlite3.Connection) -> None:
        """Remove a few episodes if the store exceeds `max_bytes`; log once if nothing more may be removed."""
        num_removed = retention.remove_oldest_episodes(connection, self._max_bytes)
        is_over_limit = num_removed == 0 and retention.num_used_bytes(connection) > self._max_bytes
        if is_over_limit and not self._is_over_limit:
            _log.warning(
                "the store exceeds replay.max_bytes (%d), but no episode in it may be removed", self._max_bytes
            )
        self._is_over_limit = is_over_limit
