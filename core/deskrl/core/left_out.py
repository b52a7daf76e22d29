"""Counts of what is left out of data, by reason and with examples."""

from __future__ import annotations

from dataclasses import dataclass, field

from deskrl.core.console import table_console

MAX_EXAMPLES = 3
"""Number of names that are kept for each reason."""


@dataclass
class _Entry:
    num: int = 0
    examples: list[str] = field(default_factory=list)


class LeftOut:
    """Episodes, steps or lines that were left out."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}

    def add(self, what: str, reason: str, name: str) -> None:
        """Count one thing.

        Args:
            what: its kind in the singular: "episode", "step" or "line".
            reason: why it was left out, without anything that differs from one to the next.
            name: where it is, for the examples.
        """
        entry = self._entries.setdefault((what, reason), _Entry())
        entry.num += 1
        if len(entry.examples) < MAX_EXAMPLES:
            entry.examples.append(name.encode(errors="replace").decode())  # names of files may be no valid text

    def count(self, what: str) -> int:
        """Return how many of a kind were left out."""
        return sum(entry.num for (kind, _), entry in self._entries.items() if kind == what)

    def reasons(self, what: str) -> dict[str, int]:
        """Return the counts of a kind by reason."""
        return {reason: entry.num for (kind, reason), entry in self._entries.items() if kind == what}

    def examples(self, what: str, reason: str) -> list[str]:
        """Return the names that were kept of what was left out for a reason."""
        return self._entries[what, reason].examples

    def print_table(self) -> None:
        """Print one row for each reason, the most frequent first; nothing if nothing was left out."""
        if not self._entries:
            return
        from rich.markup import escape
        from rich.table import Table

        table = Table("left out", "reason", "for example", title="Left out", title_justify="left")
        for (what, reason), entry in sorted(self._entries.items(), key=lambda item: -item[1].num):
            table.add_row(count_of(entry.num, what), escape(reason), escape("\n".join(entry.examples)))
        table_console().print(table)


def count_of(num: int, noun: str) -> str:
    """Return a count with its noun: "1 step", "2 steps"."""
    return f"{num} {noun}{'' if num == 1 else 's'}"
