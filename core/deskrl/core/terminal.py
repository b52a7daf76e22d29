"""Where tables are printed. Knows no table."""

from __future__ import annotations

import sys

from rich.console import Console

_PLAIN_WIDTH = 120
"""Of lines that go into a file or a pipe, where nobody says how wide they may be."""


def table_console() -> Console:
    """A console as wide as its terminal, or wide enough for a table where there is none."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
