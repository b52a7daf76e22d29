"""Read-only access to the replay store of a run, by path and beside a replay service that may be writing to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step, decode_step
from deskrl.proto.v1 import replay_pb2
from deskrl.replay import image_index, queries, schema, stored_episodes
from deskrl.replay.blob_log import RESTORE_HINT, BlobLogReader
from deskrl.replay.status_errors import StatusError
from deskrl.replay.stored_episodes import EpisodeFilter, EpisodePage, EpisodeRecord, FilterOptions, GroupRecord

_CHECK_EPISODES = 50


class ImageUnavailable(Exception):
    """A screenshot that the store does not hold, or no longer; the message names it."""


class ImageDamaged(Exception):
    """Stored bytes that are lost, or do not match the hash of the screenshot; the message names it."""


class StoreSnapshot:
    """Consistent view of the store at one moment.

    Args:
        connection: connection with an open read transaction.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Return the counters of the whole store."""
        return queries.status(self._connection)

    def find_page(self, wanted: EpisodeFilter, success_threshold: float, before: int | None, limit: int) -> EpisodePage:
        """Return one page of episodes, newest first; see `stored_episodes.find_page`."""
        return stored_episodes.find_page(self._connection, wanted, success_threshold, before, limit)

    def list_episodes(self, wanted: EpisodeFilter) -> list[EpisodeRecord]:
        """Return all ended episodes that match, newest first."""
        return stored_episodes.list_episodes(self._connection, wanted)

    def num_damaged(self) -> int:
        """Return the number of episodes that are known to be damaged."""
        return stored_episodes.num_damaged(self._connection)

    def filter_options(self) -> FilterOptions:
        """Return the values by which episodes can be filtered."""
        return stored_episodes.filter_options(self._connection)

    def newest_ending(self) -> int:
        """Return the sequence number of the episode that ended last; 0 if none has ended."""
        return stored_episodes.newest_ending(self._connection)

    def get_episode(self, episode_id: str) -> EpisodeRecord | None:
        """Return one episode, whether it has ended or not; None if the id is unknown."""
        return stored_episodes.get_episode(self._connection, episode_id)

    def get_group(self, group_id: str) -> GroupRecord | None:
        """Return one group; None if the id is unknown."""
        return stored_episodes.get_group(self._connection, group_id)

    def step_payloads(self, episode: EpisodeRecord) -> list[bytes]:
        """Return the stored steps of an episode in order, encoded; empty once retention has removed them.

        Raises:
            CodecError: a step is damaged or missing.
        """
        return stored_episodes.step_payloads(self._connection, episode)

    def read_steps(self, episode: EpisodeRecord) -> list[Step]:
        """Return the stored steps of an episode in order.

        Raises:
            CodecError: a step is damaged.
        """
        return [decode_step(payload) for payload in self.step_payloads(episode)]


class StoreReader:
    """Reader of one store; safe for concurrent use by several threads. It takes no lock and changes nothing.

    Args:
        folder: replay folder of a run.

    Raises:
        UserError: the store is missing, damaged, or not one that this version of deskrl can read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = (folder / schema.FILE_NAME).absolute()
        self._blob_log = BlobLogReader(self.path.parent)
        self._check()

    @contextmanager
    def snapshot(self) -> Iterator[StoreSnapshot]:
        """Open a consistent view of the store.

        Raises:
            sqlite3.Error: the database was damaged or removed since the reader was created.
        """
        with closing(schema.open_reader(self.path)) as connection:
            connection.execute("BEGIN")
            yield StoreSnapshot(connection)

    def read_image(self, name: str) -> bytes:
        """Return the PNG bytes of a screenshot.

        Args:
            name: SHA-256 hash of the screenshot, in hexadecimal.

        Raises:
            ImageUnavailable: the store does not hold it, or `name` is not a SHA-256 hash.
            ImageDamaged: the stored bytes do not match the hash.
        """
        try:
            # Outside a transaction, because the service may move a screenshot to another segment between two reads.
            with closing(schema.open_reader(self.path)) as connection:
                (data,) = image_index.read(connection, self._blob_log, [image_index.parse_hash(name)], 1)
        except StatusError as error:
            raise ImageUnavailable(str(error)) from error
        except image_index.ImagesDamagedError as error:
            raise ImageDamaged(str(error)) from error
        return data

    def _check(self) -> None:
        """Raise UserError unless the store can be read; the first page of episodes is read as a sample."""
        if not self.path.is_file():
            hint = "wait until the run's replay service has started, or restore the file from a copy"
            raise UserError(f"{self.path}: not found", hint)
        try:
            with closing(schema.open_reader(self.path)) as connection:
                schema.check_schema(connection, self.path)
                stored_episodes.find_page(connection, EpisodeFilter(), 0.0, None, _CHECK_EPISODES)
                image_index.check_segments(connection, self._blob_log)
        except schema.DAMAGE_ERRORS as error:
            raise UserError(f"{self.path}: cannot be read: {error}", RESTORE_HINT) from error
