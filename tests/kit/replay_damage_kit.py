"""Damage of a closed replay store, and stores of the schema before checksums."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from deskrl.replay.schema import FILE_NAME


def damage_row(folder: Path, statement: str) -> None:
    """Execute a statement on a store as damage would: without the triggers that keep the checksums."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        changed = connection.execute(statement)
        assert changed.rowcount > 0
        for _, sql in triggers:
            connection.execute(sql)


def make_schema_3(folder: Path) -> None:
    """Give a store the schema without checksums, which deskrl 0.1 had."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("DROP TABLE rollout_plans")
        connection.execute("ALTER TABLE rollouts DROP COLUMN damage")
        tables = connection.execute("SELECT name FROM sqlite_master WHERE sql LIKE '%checksum INTEGER%'").fetchall()
        for (name,) in tables:
            connection.execute(f"ALTER TABLE {name} DROP COLUMN checksum")
        connection.execute("PRAGMA user_version = 3")
