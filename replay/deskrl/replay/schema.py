"""SQLite schema of the store: creates the tables, opens the database, and rejects damaged or incompatible files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.rpc import VERSION
from deskrl.replay import counters, row_checksums, write_ahead_log
from deskrl.replay.blob_log import BLOB_DIR
from deskrl.replay.tables import TABLES

FILE_NAME = "replay.sqlite"
_APPLICATION_ID = 0x6465736B  # "desk"
_SCHEMA_VERSION = 4
_MIGRATED_VERSION = 3
"""Older schema, without checksums: readers accept it, and the service migrates it."""
_FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE}
"""SQLite's error codes for a full disk, which depend on the file being written."""
_DAMAGE_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR}
"""SQLite's primary error codes for a damaged file or disk."""
_log = logging.getLogger(__name__)

_RESTORE_HINT = "restore the file from a copy, or move its directory away to start with an empty store"


DAMAGE_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)
"""Errors of statements on a damaged file; the second one if the message of the first contains damaged text."""


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
    has_log = log_path(path).exists()
    if is_empty and has_log:
        raise UserError(f"{path}: truncated; the file is empty but has a write-ahead log", _RESTORE_HINT)
    if is_empty and any(path.parent.glob(f"{BLOB_DIR}/*")):
        raise UserError(f"{path}: not found, but its screenshots exist", _RESTORE_HINT)
    connection = open_reader(path) if has_log else _connect(path)
    has_damaged_index = False
    try:
        if has_log:
            # The last writer to close moves the log into the file, even into a damaged one. Check with a reader first.
            has_damaged_index = _check_database(connection, path)
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            connection.close()  # closing any other descriptor of its files would release SQLite's locks
            if write_ahead_log.has_lost_commit(log_path(path), page_bytes):
                raise UserError(
                    f"{log_path(path)}: damaged: it has commits that SQLite can no longer read", _RESTORE_HINT
                )
            connection = _connect(path)
        # A crash during the first start leaves a file that SQLite rolls back to an empty one.
        elif connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            create(connection)
        else:
            has_damaged_index = _check_database(connection, path)
        connection = _migrate(connection, path)
        if has_damaged_index:
            _rebuild_indexes(connection, path)
        if tables := row_checksums.damaged_tables(connection):
            raise _damage_error(path, f"rows of {', '.join(tables)}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except DAMAGE_ERRORS as error:
        connection.close()
        if is_full_disk(error):
            raise UserError(f"{path}: the disk is full", "free some space and start again (no data is lost)") from error
        raise UserError(f"{path}: cannot be opened as a replay database: {error}", _RESTORE_HINT) from error
    except UserError:
        connection.close()
        raise
    return connection


def log_path(path: Path) -> Path:
    """Return the path of the write-ahead log of a database."""
    return path.with_name(path.name + "-wal")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    row_checksums.register(connection)
    return connection


def damage_error(path: Path, error: Exception) -> UserError | None:
    """Return the error that ends the service if damage concerns more than single episodes; None for other errors."""
    if isinstance(error, row_checksums.StateDamagedError):
        return _damage_error(path, str(error))
    if isinstance(error, UnicodeDecodeError):
        return _damage_error(path, "a definition in it")
    if not isinstance(error, sqlite3.DatabaseError) or is_full_disk(error):
        return None
    if row_checksums.is_row_damage(error):
        return _damage_error(path, "a row that the run needs")
    # An error of Python's own module, such as for a wrong number of parameters, has no code.
    is_damage = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES
    return _damage_error(path, str(error)) if is_damage else None


def is_full_disk(error: Exception) -> bool:
    """Return whether a write of SQLite or of the blob log failed because the disk, a quota or a size limit is full."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode in _FULL_CODES
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_reader(path: Path) -> sqlite3.Connection:
    """Open a read-only connection, to be used by one thread at a time."""
    # Even a reader creates files for the write-ahead log, which fails for a run archived on a read-only disk.
    is_archived = not os.access(path.parent, os.W_OK) and not log_path(path).exists()
    options = "mode=ro&immutable=1" if is_archived else "mode=ro"
    connection = sqlite3.connect(f"{path.as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False)
    row_checksums.register(connection)
    if connection.execute("PRAGMA user_version").fetchone() == (_MIGRATED_VERSION,):
        row_checksums.add_checksums(connection)
    connection.execute("PRAGMA query_only = 1")
    return connection


def create(connection: sqlite3.Connection) -> None:
    """Create the tables and triggers in an empty database."""
    row_checksums.register(connection)
    connection.execute("BEGIN")  # one transaction, so that a crash leaves a complete database or an empty file
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    for statement in TABLES.split(";\n"):
        connection.execute(statement)
    row_checksums.create_triggers(connection)
    counters.put(connection, counters.CREATED_BY + VERSION, 1)
    connection.execute("COMMIT")


def _migrate(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Give a store of the older schema the present one, and return the connection to it.

    The rows are copied to a new file, which then replaces the old one: a crash leaves one or the other.

    Raises:
        UserError: another process reads the store.
    """
    if connection.execute("PRAGMA user_version").fetchone() != (_MIGRATED_VERSION,):
        return connection
    _log.info("%s: migrating from schema %d to %d", path, _MIGRATED_VERSION, _SCHEMA_VERSION)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")  # moves the write-ahead log into the file
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        hint = "close viewers and reports of this run, and start again"
        raise UserError(f"{path}: cannot be migrated while another process reads it", hint) from error
    connection.close()
    copy = path.with_name(path.name + ".migrated")
    copy.unlink(missing_ok=True)
    try:
        with closing(_connect(copy)) as migrated:
            create(migrated)
            migrated.execute("ATTACH ? AS source", (str(path),))
            migrated.execute("BEGIN")
            row_checksums.copy_rows(migrated, "source")
            migrated.execute("COMMIT")
        os.replace(copy, path)
    finally:
        copy.unlink(missing_ok=True)  # if the disk is full, for example
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)
    return _connect(path)


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless this is a replay database with a schema that this version of deskrl reads."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != _APPLICATION_ID:
        raise UserError(f"{path}: not a replay database of deskrl", _RESTORE_HINT)
    if version not in (_MIGRATED_VERSION, _SCHEMA_VERSION):
        age = "a newer" if version > _SCHEMA_VERSION else "an older"
        raise UserError(
            f"{path}: created by {age} deskrl{_created_by(connection)} with store schema {version};"
            f" deskrl {VERSION} reads schemas {_MIGRATED_VERSION} and {_SCHEMA_VERSION}",
            "continue with the deskrl that created it, or start a new run under another name",
        )
    if version == _SCHEMA_VERSION:
        _check_definitions(connection, path)


def _created_by(connection: sqlite3.Connection) -> str:
    """Return " VERSION" of the deskrl that created the store; empty for a store that does not record it."""
    statement = "SELECT substr(name, ?) FROM counters WHERE substr(name, 1, ?) = ? ORDER BY name"
    num = len(counters.CREATED_BY)
    try:
        versions = connection.execute(statement, (num + 1, num, counters.CREATED_BY)).fetchall()
    except sqlite3.DatabaseError:  # a schema without this table
        return ""
    return "".join(f" {version}" for (version,) in versions)


def _check_database(connection: sqlite3.Connection, path: Path) -> bool:
    """Check that this is a replay database of a readable schema whose tables are intact.

    Returns:
        Whether an index is damaged: `_rebuild_indexes` makes it anew.

    Raises:
        UserError: it is not.
    """
    check_schema(connection, path)
    findings = _integrity_findings(connection)
    for finding in findings:
        if not _is_in_index(finding):
            raise _damage_error(path, finding)
    return bool(findings)


def _check_definitions(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError unless the definitions of tables, indexes and triggers are those of a new database."""
    statement = "SELECT type, name, sql FROM main.sqlite_master ORDER BY type, name"
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as new:
        create(new)
        expected = new.execute(statement).fetchall()
    if connection.execute(statement).fetchall() != expected:
        raise _damage_error(path, "the definition of a table is not that of deskrl")


def _rebuild_indexes(connection: sqlite3.Connection, path: Path) -> None:
    """Rebuild all indexes, which hold nothing that the tables do not hold.

    Raises:
        UserError: a table is damaged too.
    """
    _log.warning("%s: indexes are damaged and are rebuilt", path)
    connection.execute("REINDEX")
    for finding in _integrity_findings(connection):
        raise _damage_error(path, finding)


def _damage_error(path: Path, finding: str) -> UserError:
    return UserError(f"{path}: damaged: {' '.join(finding.split())}", _RESTORE_HINT)


def _integrity_findings(connection: sqlite3.Connection) -> list[str]:
    """Return what SQLite finds damaged in tables and indexes; empty if nothing is."""
    findings = [row[0] for row in connection.execute("PRAGMA main.integrity_check(1000)")]
    return [] if findings == ["ok"] else findings


def _is_in_index(finding: str) -> bool:
    """Return whether a finding of SQLite says that an index does not match its table."""
    return "index" in finding and finding.startswith(("row ", "wrong # of entries", "non-unique entry"))
