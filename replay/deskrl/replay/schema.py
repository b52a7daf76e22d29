"""SQLite schema of the store: creates the tables, opens the database, and rejects damaged or incompatible files."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.rpc import VERSION
from deskrl.replay import counters
from deskrl.replay.blob_log import BLOB_DIR

FILE_NAME = "replay.sqlite"
_APPLICATION_ID = 0x6465736B  # "desk"
_SCHEMA_VERSION = 3
_FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE}
"""SQLite's error codes for a full disk, which depend on the file being written."""
_RESTORE_HINT = "restore the file from a copy, or move its directory away to start with an empty store"

# Screenshots are nearly all of the bytes and are stored in the blob log; `images` has their locations.
# `groups.state`: open -> complete -> bound -> consumed, or open -> closed (too few members).
# `rollouts.state`: planned, leased, finished, faulted. `leases.state`: active, finished, faulted, expired, released.
# Values that episodes are searched by have columns of their own and outlive the messages that they come from:
# `termination` (of `result`), `fault_kind` (of `last_fault`), policy versions of the tokens (`lineage` of the last).
# Older names: `paced` means rate limited, `begun` means started, `num_expiries` counts expired leases.
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


def lock_store(store_dir: Path) -> int:
    """Lock the directory of the store and return the lock's descriptor. The kernel unlocks it when the process ends.

    Raises:
        UserError: another process holds it.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{store_dir} is in use by another replay service", "stop that one first") from error
    return descriptor


def open_database(path: Path) -> sqlite3.Connection:
    """Open the connection of the writer: create the tables in a new file, or check the whole of an existing one.

    Raises:
        UserError: the file is damaged, not a replay database, or written by an incompatible version; or it is missing
            although its write-ahead log or its screenshots exist. No file is changed.
    """
    is_empty = not path.exists() or path.stat().st_size == 0
    has_log = path.with_name(path.name + "-wal").exists()
    if is_empty and has_log:
        raise UserError(f"{path}: truncated; the file is empty but has a write-ahead log", _RESTORE_HINT)
    if is_empty and any(path.parent.glob(f"{BLOB_DIR}/*")):
        raise UserError(f"{path}: not found, but its screenshots exist", _RESTORE_HINT)
    connection = open_reader(path) if has_log else _connect(path)
    try:
        if has_log:
            # The last writer to close moves the log into the file, even into a damaged one. Check with a reader first.
            _check_database(connection, path)
            connection.close()
            connection = _connect(path)
        # A crash during the first start leaves a file that SQLite rolls back to an empty one.
        elif connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            _create(connection)
        else:
            _check_database(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_full_disk(error):
            raise UserError(f"{path}: the disk is full", "free some space and start again (no data is lost)") from error
        raise UserError(f"{path}: cannot be opened as a replay database: {error}", _RESTORE_HINT) from error
    except UserError:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def is_full_disk(error: Exception) -> bool:
    """Return whether a write of SQLite or of the blob log failed because the disk is full."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode in _FULL_CODES
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def open_reader(path: Path) -> sqlite3.Connection:
    """Open a read-only connection, to be used by one thread at a time."""
    # Even a reader creates files for the write-ahead log, which fails for a run archived on a read-only disk.
    is_archived = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
    options = "mode=ro&immutable=1" if is_archived else "mode=ro"
    connection = sqlite3.connect(f"{path.as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = 1")
    return connection


def _create(connection: sqlite3.Connection) -> None:
    # One transaction, so that a crash leaves a complete database or an empty file.
    connection.executescript(
        f"BEGIN; PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_SCHEMA_VERSION}; {_TABLES}"
        f" INSERT INTO counters VALUES ('{counters.CREATED_BY}{VERSION}', 1); COMMIT;"
    )


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless this is a replay database with the schema of this version of deskrl."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != _APPLICATION_ID:
        raise UserError(f"{path}: not a replay database of deskrl", _RESTORE_HINT)
    if version != _SCHEMA_VERSION:
        age = "a newer" if version > _SCHEMA_VERSION else "an older"
        raise UserError(
            f"{path}: created by {age} deskrl{_created_by(connection)} with store schema {version};"
            f" deskrl {VERSION} reads schema {_SCHEMA_VERSION}",
            "continue with the deskrl that created it, or start a new run under another name",
        )


def _created_by(connection: sqlite3.Connection) -> str:
    """Return " VERSION" of the deskrl that created the store; empty for a store that does not record it."""
    try:
        versions = counters.read_all(connection, counters.CREATED_BY)
    except sqlite3.DatabaseError:  # a schema without this table
        return ""
    return "".join(f" {version}" for version in versions)


def _check_database(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless this is an undamaged replay database of this schema."""
    check_schema(connection, path)
    findings = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    if findings != ["ok"]:
        raise UserError(f"{path}: damaged: {' '.join(findings[0].split())}", _RESTORE_HINT)
