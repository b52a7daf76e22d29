"""Console output of every command: the format of log lines and the width of tables."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 100_000
"""Maximum width of a table that is written to a file or a pipe, in characters: enough for every cell on one line."""


def set_up_logging(role: str) -> None:
    """Send log records to standard error as lines of time, role, level and message.

    The level is INFO for deskrl's own loggers and WARNING for those of libraries.

    Args:
        role: name of the process in each line, such as `replay` or `actor-0`.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format=f"%(asctime)s {role} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("deskrl").setLevel(logging.INFO)


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal, or so wide that no table is folded if there is none.

    COLUMNS counts only in a terminal: programs with readline export it to their children, whatever those write to.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
