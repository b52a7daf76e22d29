"""Options that name an entry of a table with free keys, such as `--reward.terms.task.weight 0.5`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any


def join_table_options(arguments: Sequence[str], tables: Collection[str]) -> list[str]:
    """Return the options with those of a table's entries as one option for the table, in JSON.

    pydantic-settings knows options of fields only. A value is JSON if it can be parsed as such, and otherwise text.

    Args:
        arguments: command-line options.
        tables: dotted keys of the tables.
    """
    joined: list[str] = []
    entries: dict[str, dict[str, Any]] = {}
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        table = next((table for table in tables if option.startswith(f"--{table}.")), None)
        if table is None:
            joined.append(argument)
            continue
        *parts, name = option.removeprefix(f"--{table}.").split(".")
        entry = entries.setdefault(table, {})
        for part in parts:
            inner = entry.get(part)
            entry[part] = inner if isinstance(inner, dict) else {}
            entry = entry[part]
        entry[name] = _parsed(value if equals else next(remaining, ""))
    return [*joined, *(f"--{table}={json.dumps(entry)}" for table, entry in entries.items())]


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
