"""Progress display of `deskrl up`: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from deskrl.launch.progress import Progress

_PLAIN_INTERVAL_S = 10.0


class LiveDisplay:
    """Context manager; call `show(progress)` repeatedly within it."""

    def __init__(self, console: Console, name: str, num_updates: int, env_steps: int = 0) -> None:
        self._console = console
        self._name = name
        self._num_updates = num_updates
        self._env_steps = env_steps
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_plain: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> LiveDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show the progress; without a terminal, print a line at each change of phase and every ten seconds."""
        if self._live:
            self._live.update(self._panel(progress))
            return
        phase, at = self._last_plain
        if progress.phase != phase or time.monotonic() - at >= _PLAIN_INTERVAL_S:
            self._last_plain = (progress.phase, time.monotonic())
            self._console.print(self._line(progress), highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print one permanent line."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _fields(self, progress: Progress) -> list[tuple[str, str]]:
        rate = "-" if progress.success_rate is None else f"{progress.success_rate:.0%}"
        return [
            ("phase", progress.phase),
            ("update", f"{progress.num_updates}/{self._num_updates}"),
            *([("env steps", f"{progress.num_env_steps}/{self._env_steps}")] if self._env_steps else []),
            ("success", rate),
            ("episodes", f"{progress.num_episodes} (+{progress.num_running} running)"),
            ("version", progress.version),
            ("env steps/min", f"{progress.env_steps_per_minute:.0f}"),
            ("faults", str(progress.num_faults)),
            ("elapsed", format_minutes(progress.elapsed_s)),
            ("left", "-" if progress.left_s is None else f"~{format_minutes(progress.left_s)}"),
        ]

    def _panel(self, progress: Progress) -> Panel:
        table = Table.grid(padding=(0, 2))
        for name, value in self._fields(progress):
            table.add_row(f"[dim]{name}", value)
        return Panel(table, title=f"deskrl {self._name}", title_align="left", expand=False)

    def _line(self, progress: Progress) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._fields(progress))


def format_minutes(seconds: float) -> str:
    """Format seconds as minutes and seconds, such as 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
