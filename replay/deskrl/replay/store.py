"""Durable store of one run: one writer with group commit, concurrent readers, and retention in every commit.

The blob log is synced before the database commits, so that a committed row never names bytes that are not on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path

from deskrl.replay import damaged_episodes, image_index, retention, schema
from deskrl.replay.blob_log import BlobLog
from deskrl.replay.damaged_episodes import DamagedEpisode, EpisodesDamagedError
from deskrl.replay.row_checksums import StateDamagedError
from deskrl.replay.status_errors import StoreDamagedError
from deskrl.replay.writer import Commit, Operation, T, Writer

_log = logging.getLogger(__name__)

_NUM_READERS = 4


class Store:
    """Durable store of one run, held by one process at a time."""

    def __init__(
        self,
        store_dir: Path,
        max_bytes: int,
        after_commit: Callable[[Commit], None] = lambda commit: None,
        after_set_aside: Callable[[list[DamagedEpisode]], None] = lambda episodes: None,
        success_threshold: float = 0.0,
    ) -> None:
        """Open the store, or create it.

        Args:
            store_dir: replay directory of the run.
            max_bytes: size in bytes above which consumed episodes are removed.
            after_commit: called after each commit, in the writer's thread.
            after_set_aside: called with the episodes that were found damaged, after the commit, in the writer's thread.
            success_threshold: rewards above this are successes, for the counts of a group with a damaged member.

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
        self._success_threshold = success_threshold
        self.failure: Future[None] = Future()
        """Ends with a UserError once damage is found that concerns more than single episodes."""
        self.set_aside_callbacks: list[Callable[[list[DamagedEpisode]], None]] = [_log_set_aside, after_set_aside]
        """Called in the writer's thread, after the commit, with the episodes that were set aside."""
        self._episodes_set_aside: list[DamagedEpisode] = []
        self._writer = Writer(
            connection,
            self._before_commit,
            self._committed,
            self._rolled_back,
            lambda connection: self._set_aside(connection, {}, ()),
            self._translate,
        )
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="replay-reader")
        self._thread_local = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []
        self._files: dict[Path, os.stat_result] = {}
        try:
            self.submit(lambda connection: self._set_aside(connection, {}, ())).result()
        except StoreDamagedError:
            self.close()
            self.failure.result()  # raises the UserError
        self._files = {path: path.stat() for path in (self.path, schema.log_path(self.path))}  # the write created both

    def submit(self, operation: Operation[T]) -> Future[T]:
        """Queue a write; the future resolves once it is on disk."""
        return self._writer.submit(operation)

    async def write(self, operation: Operation[T]) -> T:
        """Write, and wait until it is on disk. The write is done even if the waiter is cancelled."""
        return await self._writer.run(operation)

    async def set_aside(self, reasons: dict[int, str], hashes: Iterable[bytes] = ()) -> bool:
        """Set aside damaged episodes, and return whether there were any.

        Args:
            reasons: what was found damaged, by row id of the rollout.
            hashes: screenshots that were found damaged or missing; all episodes that use them are set aside.
        """
        return await self.write(lambda connection: self._set_aside(connection, reasons, hashes))

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
        try:
            return operation(connection)
        except EpisodesDamagedError:
            connection.execute("PRAGMA shrink_memory")  # read again from the disk, in case it is damaged in memory only
            raise
        except (*schema.DAMAGE_ERRORS, StateDamagedError) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> Exception:
        """Return the error for the callers of an operation, after ending the service if the store is damaged."""
        failure = schema.damage_error(self.path, error)
        if failure is None:
            return error
        with contextlib.suppress(InvalidStateError):  # it has failed before
            self.failure.set_exception(failure)
        return StoreDamagedError(failure.message)

    def _set_aside(self, connection: sqlite3.Connection, reasons: dict[int, str], hashes: Iterable[bytes]) -> bool:
        """Set aside all episodes with damaged rows, and those that are named if they are found damaged again."""
        threshold = self._success_threshold
        connection.execute("PRAGMA shrink_memory")  # what is in memory may be intact although it is damaged on disk
        episodes = damaged_episodes.set_aside_damaged_rows(connection, threshold)
        confirmed = {one: reason for one in reasons if (reason := damaged_episodes.find_damage(connection, one))}
        episodes += damaged_episodes.set_aside(connection, confirmed, threshold)
        damaged_images = image_index.confirm_damaged(connection, self.blob_log, hashes)
        episodes += damaged_episodes.set_aside_users(connection, damaged_images, threshold)
        self._episodes_set_aside += episodes
        return bool(episodes)

    def _before_commit(self, connection: sqlite3.Connection) -> None:
        self._check_files()
        self._retain(connection)
        self._unused_segments = retention.compact_segments(connection, self.blob_log)
        self.blob_log.sync()

    def _check_files(self) -> None:
        """Raise StateDamagedError if someone else has removed or replaced a file of the database.

        SQLite goes on in the removed files, which end with the process: what is acknowledged then would be lost.
        """
        for path, opened in self._files.items():
            try:
                is_same = os.path.samestat(os.stat(path), opened)
            except FileNotFoundError:
                is_same = False
            if not is_same:
                raise StateDamagedError(f"{path.name} was removed or replaced while replay ran")

    def _committed(self, commit: Commit) -> None:
        self.blob_log.commit()
        self.blob_log.remove(self._unused_segments)
        self._after_commit(commit)
        if episodes := self._episodes_set_aside:
            self._episodes_set_aside = []
            for callback in self.set_aside_callbacks:
                callback(episodes)

    def _rolled_back(self) -> None:
        self.blob_log.roll_back()
        self._episodes_set_aside = []

    def _retain(self, connection: sqlite3.Connection) -> None:
        """Remove a few episodes if the store exceeds `max_bytes`; log once if nothing more may be removed."""
        num_removed = retention.remove_oldest_episodes(connection, self._max_bytes)
        is_over_limit = num_removed == 0 and retention.num_used_bytes(connection) > self._max_bytes
        if is_over_limit and not self._is_over_limit:
            _log.warning(
                "the store exceeds replay.max_bytes (%d), but no episode in it may be removed", self._max_bytes
            )
        self._is_over_limit = is_over_limit


def _log_set_aside(episodes: list[DamagedEpisode]) -> None:
    """Log each episode that is played again, and the number of others."""
    for episode in episodes:
        if episode.is_repeated:
            _log.error("episode %s is damaged (%s): set aside, and played again", episode.episode_id, episode.reason)
    others = [episode for episode in episodes if not episode.is_repeated]
    if others:
        _log.error(
            "%d episodes that were used before are damaged and can no longer be read, the first of them %s (%s)",
            len(others),
            others[0].episode_id,
            others[0].reason,
        )
