"""Checksums of the rows of the store: written by triggers with every row, and verified by the statements that read.

A checksum has 63 bits of the XXH3 hash of the types and values of all other columns. Triggers compute it at every
write, and verify the old row at every update, so that no write makes a damaged row valid. Rows of `steps` never change
and are large: they are written with their checksum (`step_checksum`), which saves a second write.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgpack
from xxhash import xxh3_64_intdigest

from deskrl.replay.tables import TABLES

_KEYS = {
    "counters": ("name",),
    "policy": ("rowid",),
    "groups": ("position",),
    "rollouts": ("id",),
    "rollout_plans": ("rollout",),
    "leases": ("lease_id",),
    "segments": ("number",),
    "batches": ("queue", "batch_id"),
    "successes": ("number",),
    "success_uses": ("task_id",),
}
"""Tables whose rows have checksums written by triggers, with the columns that identify a row."""
_DAMAGED = "user-defined function raised exception"
"""Text of SQLite's error when `verify_row` raises; Python's module does not pass on the cause."""


def step_checksum(rollout: int, step: int, payload: bytes) -> int:
    """Return the checksum of a row of `steps`."""
    return xxh3_64_intdigest(payload, seed=rollout << 16 ^ step) >> 1


def is_step_intact(rollout: int, step: int, payload: object, checksum: object) -> bool:
    """Return whether a row of `steps` has its checksum."""
    return isinstance(payload, bytes) and checksum == step_checksum(rollout, step, payload)


def register(connection: sqlite3.Connection) -> None:
    """Add the functions that triggers, verifying statements and `add_checksums` call to a connection."""
    pack = msgpack.Packer().pack  # one per connection: it is not thread-safe, and allocates a large buffer

    def row_checksum(*values: object) -> int:
        return xxh3_64_intdigest(pack(values)) >> 1

    def row_is_intact(checksum: int | None, *values: object) -> bool:
        return checksum == xxh3_64_intdigest(pack(values)) >> 1

    def verify_row(checksum: int | None, *values: object) -> int:
        if checksum != xxh3_64_intdigest(pack(values)) >> 1:
            raise ValueError("damaged row")
        return 1

    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    connection.create_function("row_is_intact", -1, row_is_intact, deterministic=True)
    connection.create_function("verify_row", -1, verify_row, deterministic=True)
    connection.create_function("step_checksum", 3, step_checksum, deterministic=True)
    # A damaged text must not prevent that the rest of the row is read, whose checksum then says that it is damaged.
    connection.text_factory = _decode


def create_triggers(connection: sqlite3.Connection) -> None:
    """Create the triggers of all tables; part of the creation of a store."""
    for table, key in _KEYS.items():
        is_key = " AND ".join(f"{column} = NEW.{column}" for column in key)
        update = f"UPDATE {table} SET checksum = row_checksum({_values(table, 'NEW')}) WHERE {is_key};"
        columns = ", ".join(name for name, _ in _columns(table))
        connection.execute(f"CREATE TRIGGER {table}_inserted AFTER INSERT ON {table} BEGIN {update} END")
        connection.execute(
            f"CREATE TRIGGER {table}_updated AFTER UPDATE OF {columns} ON {table}"
            f" BEGIN SELECT verify_row(OLD.checksum, {_values(table, 'OLD')}); {update} END"
        )


def add_checksums(connection: sqlite3.Connection) -> None:
    """Make a store without checksums, of schema 3, readable: temporary views add the columns that it lacks."""
    for table in _KEYS.keys() - {"rollout_plans"}:
        added = ", '' AS damage" if table == "rollouts" else ""
        connection.execute(
            f"CREATE TEMP VIEW {table} AS SELECT t.*, row_checksum({_values(table, 't')}) AS checksum"
            f" FROM (SELECT *{added} FROM main.{table}) t"
        )
    connection.execute(
        "CREATE TEMP VIEW steps AS SELECT *, step_checksum(rollout, step, payload) AS checksum FROM main.steps"
    )


def copy_rows(connection: sqlite3.Connection, source: str) -> None:
    """Copy all rows of an attached store without checksums, of schema 3, into this one, whose triggers add checksums.

    Args:
        connection: connection to a new store.
        source: schema name of the attached store.
    """
    tables = [*(_KEYS.keys() - {"rollout_plans"}), "task_files", "images", "image_uses"]  # images keep no checksum
    for table in sorted(tables):
        columns = ", ".join(name for name, _ in _columns(table) if name != "damage")
        connection.execute(f"INSERT OR REPLACE INTO {table} ({columns}) SELECT {columns} FROM {source}.{table}")
    connection.execute(
        "INSERT INTO steps (id, rollout, step, payload, checksum)"
        f" SELECT id, rollout, step, payload, step_checksum(rollout, step, payload) FROM {source}.steps"
    )
    connection.execute(
        "INSERT INTO rollout_plans (rollout, episode_id, group_position, member, seed)"
        " SELECT id, episode_id, group_position, member, seed FROM rollouts"
    )


def verified(table: str, alias: str) -> str:
    """Return an SQL condition that is true for an intact row and ends the statement with an error for a damaged one."""
    return f"verify_row({alias}.checksum, {_values(table, alias)})"


def intact(table: str, alias: str) -> str:
    """Return an SQL expression that is 1 for an intact row and 0 for a damaged one."""
    return f"row_is_intact({alias}.checksum, {_values(table, alias)})"


def is_row_damage(error: sqlite3.Error) -> bool:
    """Return whether a statement ended because it met a damaged row."""
    return isinstance(error, sqlite3.OperationalError) and str(error) == _DAMAGED


class StateDamagedError(Exception):
    """A row is damaged or missing without which the store cannot go on."""


def existing(row: Sequence[Any] | None, table: str) -> Sequence[Any]:
    """Return a row that must exist.

    Raises:
        StateDamagedError: there is none.
    """
    if row is None:
        raise StateDamagedError(f"a row of {table} is missing")
    return row


def damaged_tables(connection: sqlite3.Connection) -> list[str]:
    """Return the tables with damaged rows, other than those of which a damaged row concerns a single episode."""
    return [
        table
        for table in _KEYS
        if table not in ("rollouts", "rollout_plans")
        and connection.execute(f"SELECT 1 FROM {table} t WHERE NOT {intact(table, 't')} LIMIT 1").fetchone()
    ]


@functools.cache
def _columns(table: str) -> Sequence[tuple[str, str]]:
    """Return name and declared type of each column but the checksum."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(TABLES)
    rows = connection.execute(f"PRAGMA table_info({table})").fetchall()
    connection.close()
    return [(row[1], row[2]) for row in rows if row[1] != "checksum"]


@functools.cache
def _values(table: str, alias: str) -> str:
    """Return the arguments of the checksum of a row.

    Damage may change the type of a value, or make a text invalid, which Python's module cannot pass on. Texts and blobs
    are therefore passed as bytes, with their types in an argument of their own.
    """
    columns = _columns(table)
    kinds = [f"typeof({alias}.{name})" for name, kind in columns if kind in ("TEXT", "BLOB")]
    values = [
        f"CAST({alias}.{name} AS BLOB)" if kind in ("TEXT", "BLOB") else f"{alias}.{name}" for name, kind in columns
    ]
    return ", ".join(values + (["||".join(kinds)] if kinds else []))


def _decode(data: bytes) -> str:
    return data.decode(errors="replace")
