"""Terminal dashboard of a run: scrapes the metrics ports and redraws the panels at an interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deskrl.analysis.run_config import read_run_config
from deskrl.analysis.status import last_phase
from deskrl.analysis.top import panels
from deskrl.analysis.top.panels import MetricPanel
from deskrl.analysis.top.scrape import is_of_run, metrics_addresses, read_all, read_gpus
from deskrl.analysis.top.timeseries import ScrapeWindow
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import RunIdentity, read_identity
from deskrl.launch.live_display import format_minutes

_TWO_COLUMN_WIDTH = 130
"""Minimum width of a terminal, in characters, for two panels side by side."""
_PLAIN_WIDTH = 160
"""Width in characters if standard output is not a terminal. Panels have a fixed width, unlike tables."""


def top(root: Path, interval_s: float, num_frames: int | None) -> int:
    """Show the metrics of a run; returns the exit status.

    Args:
        root: run directory.
        interval_s: seconds between two scrapes.
        num_frames: number of times the dashboard is drawn; None: until Ctrl-C in a terminal, otherwise once.

    Raises:
        UserError: `root` contains no run, the run serves no metrics, or none of its roles is reachable.
    """
    run_dir = RunDir(root.absolute())
    config = read_run_config(run_dir)
    run = read_identity(run_dir, config.name)
    addresses = metrics_addresses(config)
    if not addresses:
        raise UserError(f"{run_dir.root} serves no metrics", "start the run with metrics ports, see docs/monitoring.md")
    console, window = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH), ScrapeWindow()
    started_s = time.monotonic()
    _scrape(window, addresses, run)
    if num_frames is None and not console.is_terminal:
        num_frames = 1
    with Live(console=console, auto_refresh=False, screen=num_frames is None) as live:
        num_drawn = 0
        while num_frames is None or num_drawn < num_frames:
            time.sleep(interval_s)
            reachable = _scrape(window, addresses, run)
            title = f"deskrl {config.name}   {last_phase(run_dir)}   {format_minutes(time.monotonic() - started_s)}"
            shown_panels = [
                panels.environments(window),
                panels.inference(window),
                panels.training(window),
                panels.machine(window, read_gpus(), reachable, addresses),
            ]
            live.update(_draw(title, shown_panels, console.width), refresh=True)
            num_drawn += 1
    return 0


def _scrape(window: ScrapeWindow, addresses: Sequence[str], run: RunIdentity) -> list[str]:
    """Add one scrape of all processes of the run to the window; returns the addresses that were reachable."""
    found = read_all(addresses)
    scrapes = {address: scrape for address, scrape in found.items() if is_of_run(scrape, run)}
    if not scrapes:
        others = "; processes of another run serve there" if found else ""
        raise UserError(
            f"no role of the run is reachable at {', '.join(addresses)}{others}",
            "start the run; deskrl status RUN shows which roles are running",
        )
    window.add(time.monotonic(), scrapes)
    return list(scrapes)


def _draw(title: str, shown_panels: Sequence[MetricPanel], width: int) -> Group:
    cells = [_draw_panel(panel) for panel in shown_panels]
    grid = Table.grid(expand=True)
    per_row = 2 if width >= _TWO_COLUMN_WIDTH else 1
    for _ in range(per_row):
        grid.add_column(ratio=1)
    for start in range(0, len(cells), per_row):
        grid.add_row(*cells[start : start + per_row])
    return Group(Text(title, style="bold"), grid)


def _draw_panel(panel: MetricPanel) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, value in panel.rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return Panel(table, title=panel.title, title_align="left")
