"""The loop of `deskrl top`: scrape, compute, draw, until a key ends it. Knows the terminal and the run's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deskrl.core.config import read_resolved
from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.live import clock
from deskrl.core.status import phase_of
from deskrl.core.top import panels
from deskrl.core.top.panels import Figures
from deskrl.core.top.scrape import metrics_addresses, read_all, read_gpus
from deskrl.core.top.window import Window

_WIDE = 130
"""Columns from which on two panels stand side by side."""


def top(root: Path, interval_s: float, num_frames: int | None) -> int:
    """Show a run's figures until Ctrl-C, or so many times; returns the exit status.

    Args:
        root: the run's folder.
        interval_s: between two looks.
        num_frames: how often; None: until Ctrl-C in a terminal, once where there is none.

    Raises:
        UserError: there is no run, it serves no metrics, or nothing of it answers.
    """
    folder = RunFolder(root.absolute())
    config = read_resolved(folder.config)
    addresses = metrics_addresses(config)
    if not addresses:
        raise UserError(f"{folder.root} serves no metrics", "start the run with ports, as docs/watching.md has them")
    console, window = Console(), Window()
    started_s = time.monotonic()
    _look(window, addresses)
    if num_frames is None and not console.is_terminal:
        num_frames = 1
    with Live(console=console, auto_refresh=False, screen=num_frames is None) as live:
        shown = 0
        while num_frames is None or shown < num_frames:
            time.sleep(interval_s)
            answering = _look(window, addresses)
            title = f"deskrl {config.name}   {phase_of(folder)}   {clock(time.monotonic() - started_s)}"
            figures = [
                panels.environments(window),
                panels.inference(window),
                panels.learning(window),
                panels.machine(window, read_gpus(), answering, addresses),
            ]
            live.update(_draw(title, figures, console.width), refresh=True)
            shown += 1
    return 0


def _look(window: Window, addresses: Sequence[str]) -> list[str]:
    """Scrape once; which addresses answered."""
    scrapes = read_all(addresses)
    if not scrapes:
        listed = ", ".join(addresses)
        raise UserError(f"no role answers at {listed}", "start the run, or look with deskrl status RUN what is wrong")
    window.add(time.monotonic(), scrapes)
    return list(scrapes)


def _draw(title: str, figures: Sequence[Figures], width: int) -> Group:
    cells = [_panel(one) for one in figures]
    grid = Table.grid(expand=True)
    per_row = 2 if width >= _WIDE else 1
    for _ in range(per_row):
        grid.add_column(ratio=1)
    for start in range(0, len(cells), per_row):
        grid.add_row(*cells[start : start + per_row])
    return Group(Text(title, style="bold"), grid)


def _panel(figures: Figures) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, value in figures.rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return Panel(table, title=figures.title, title_align="left")
