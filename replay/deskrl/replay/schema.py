"""The database file: its tables, how it is opened, and how a damaged or foreign one is told from ours.

Knows SQLite and the layout; knows no rule by which rows change (`rollouts`, `batches`, `successes`, `retention`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.replay.segments import SCREENSHOTS

FILE_NAME = "replay.sqlite"
_APPLICATION_ID = 0x6465736B  # "desk"
_SCHEMA_VERSION = 3
_FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE}
"""What SQLite says on a full disk, depending on which of its files it was about to write."""
_MEND = "restore the file from a copy, or move its folder away and start the run anew"

# Screenshots are nearly all bytes and lie in segments (see `segments`); a row says where.
# `groups.state`: open -> complete -> bound -> consumed, or open -> closed (too few members).
# `rollouts.state`: planned, leased, finished, faulted. `leases.state`: active, finished, faulted, expired, released.
# What episodes are looked up by stands beside the message that it comes from, and outlives it: `termination` of
# `result`, `fault_kind` of `last_fault`, policy versions of the steps' tokens (`lineage` is that of the last token).
_TABLES = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE policy (lineage TEXT NOT NULL, step INTEGER NOT NULL);
CREATE TABLE task_files (hash BLOB PRIMARY KEY, task_json BLOB NOT NULL) WITHOUT ROWID;

CREATE TABLE groups (
    position INTEGER PRIMARY KEY,
    group_id TEXT NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    task_id TEXT NOT NULL,
    task_hash BLOB NOT NULL REFERENCES task_files (hash),
    max_steps INTEGER NOT NULL,
    temperature REAL NOT NULL,
    acting_policy INTEGER NOT NULL,
    paced INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open',
    begun INTEGER NOT NULL DEFAULT 0,
    num_planned INTEGER NOT NULL,
    num_leased INTEGER NOT NULL DEFAULT 0,
    num_finished INTEGER NOT NULL DEFAULT 0,
    num_faulted INTEGER NOT NULL DEFAULT 0,
    num_succeeded INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL DEFAULT 0,
    completion INTEGER,
    batch_id TEXT,
    ordinal INTEGER,
    candidate INTEGER REFERENCES rollouts (id),
    dropped INTEGER NOT NULL DEFAULT 0,
    dropped_because TEXT NOT NULL DEFAULT '',
    used_candidate INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX grantable_groups ON groups (paced, begun DESC, position) WHERE num_planned > 0;
CREATE INDEX groups_by_state ON groups (state, queue, completion);
CREATE UNIQUE INDEX bindings ON groups (queue, batch_id, ordinal) WHERE batch_id IS NOT NULL;
CREATE INDEX pending_candidates ON groups (candidate) WHERE candidate IS NOT NULL;

CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY,
    episode_id TEXT NOT NULL UNIQUE,
    group_position INTEGER NOT NULL REFERENCES groups (position),
    member INTEGER NOT NULL,
    seed TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'planned',
    num_faults INTEGER NOT NULL DEFAULT 0,
    num_expiries INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL DEFAULT 0,
    reward REAL,
    result BLOB,
    last_fault BLOB,
    termination INTEGER,
    fault_kind INTEGER,
    lineage TEXT,
    oldest_version INTEGER,
    newest_version INTEGER,
    ending INTEGER,
    ended_unix_s REAL,
    removable INTEGER NOT NULL DEFAULT 0,
    removed INTEGER NOT NULL DEFAULT 0,
    UNIQUE (group_position, member)
);
CREATE INDEX rollouts_by_ending ON rollouts (ending) WHERE ending IS NOT NULL;
CREATE INDEX removable_rollouts ON rollouts (ending) WHERE removable;

CREATE TABLE leases (
    lease_id TEXT PRIMARY KEY,
    rollout INTEGER NOT NULL REFERENCES rollouts (id),
    request_id TEXT NOT NULL,
    holder TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'active'
) WITHOUT ROWID;
CREATE UNIQUE INDEX active_requests ON leases (request_id) WHERE state = 'active';
CREATE UNIQUE INDEX active_rollouts ON leases (rollout) WHERE state = 'active';
CREATE INDEX leases_by_rollout ON leases (rollout);

CREATE TABLE steps (
    id INTEGER PRIMARY KEY,
    rollout INTEGER NOT NULL REFERENCES rollouts (id),
    step INTEGER NOT NULL,
    payload BLOB NOT NULL,
    UNIQUE (rollout, step)
);
CREATE TABLE segments (number INTEGER PRIMARY KEY, num_bytes INTEGER NOT NULL, live_bytes INTEGER NOT NULL);
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    hash BLOB NOT NULL,
    num_bytes INTEGER NOT NULL,
    segment INTEGER NOT NULL REFERENCES segments (number),
    position INTEGER NOT NULL
);
CREATE UNIQUE INDEX images_by_hash ON images (hash, num_bytes);
CREATE INDEX images_by_segment ON images (segment);
CREATE TABLE image_uses (rollout INTEGER NOT NULL, image INTEGER NOT NULL, PRIMARY KEY (rollout, image)) WITHOUT ROWID;
CREATE INDEX uses_by_image ON image_uses (image);

CREATE TABLE batches (
    queue TEXT NOT NULL,
    batch_id TEXT NOT NULL,
    committed INTEGER NOT NULL DEFAULT 0,
    lineage TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (queue, batch_id)
) WITHOUT ROWID;

CREATE TABLE successes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL,
    rollout INTEGER NOT NULL UNIQUE REFERENCES rollouts (id),
    lineage TEXT NOT NULL,
    step INTEGER NOT NULL
);
CREATE INDEX successes_by_task ON successes (task_id, number);
CREATE TABLE success_uses (task_id TEXT PRIMARY KEY, num_used INTEGER NOT NULL) WITHOUT ROWID;
"""


def lock_folder(folder: Path) -> int:
    """Hold the store's folder for this process; the kernel lets go when the process ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is served by another process", "stop that one first") from error
    return descriptor


def open_database(path: Path) -> sqlite3.Connection:
    """Open the writer's connection; a new file gets its tables, an old one is checked whole.

    Raises:
        UserError: the file is damaged, no database, of something else, or of another version, or it is missing and what
            belongs to it is not. All is left as it is.
    """
    is_empty = not path.exists() or path.stat().st_size == 0
    has_log = path.with_name(path.name + "-wal").exists()
    if is_empty and has_log:
        raise UserError(f"{path} is empty, yet has a write-ahead log: it was cut short", _MEND)
    if is_empty and any(path.parent.glob(f"{SCREENSHOTS}/*")):
        raise UserError(f"{path} is missing, and screenshots of its are there", _MEND)
    connection = open_reader(path) if has_log else _connect(path)
    try:
        if has_log:
            # The last writer to close moves the log into the file, even into a damaged one: look before there is one.
            _check(connection, path)
            connection.close()
            connection = _connect(path)
        # A crash in the middle of the first start leaves a file that SQLite rolls back to an empty one.
        elif connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            _create(connection)
        else:
            _check(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_full_disk(error):
            raise UserError(f"{path}: the disk is full", "free some space and start again; nothing is lost") from error
        raise UserError(f"{path} cannot be opened as a replay database: {error}", _MEND) from error
    except UserError:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of space: SQLite's, or one beside it."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode in _FULL_CODES
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads, for use by one thread at a time."""
    # Even a reader makes files of the write-ahead log, where a run that was put away on a read-only disk lets it not.
    is_put_away = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
    options = "mode=ro&immutable=1" if is_put_away else "mode=ro"
    connection = sqlite3.connect(f"{path.as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = 1")
    return connection


def _create(connection: sqlite3.Connection) -> None:
    # One transaction, so that a crash leaves a whole database or an empty file.
    connection.executescript(
        f"BEGIN; PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_SCHEMA_VERSION}; {_TABLES} COMMIT;"
    )


def refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless the database is ours, and of the layout that this version knows."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != _APPLICATION_ID:
        raise UserError(f"{path} is a database of something else", _MEND)
    if version != _SCHEMA_VERSION:
        age = "a newer" if version > _SCHEMA_VERSION else "an older"
        other = f"{path} is of {age} deskrl: its layout is {version}, and this one knows {_SCHEMA_VERSION}"
        raise UserError(other, "use the deskrl that wrote it, or start the run anew under another name")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless the whole database is ours and sound."""
    refuse_foreign(connection, path)
    findings = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    if findings != ["ok"]:
        raise UserError(f"{path} is damaged: {' '.join(findings[0].split())}", _MEND)
