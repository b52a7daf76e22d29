"""A real desktop for the length of a test, in a folder that leaves with it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.core.config import DesktopConfig

DEADLINE_S = 60.0


@pytest.fixture
def run_root() -> Iterator[Path]:
    """Where desktops keep their folders; short, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        yield Path(folder) / "desktops"


@asynccontextmanager
async def running_desktop(config: DesktopConfig, run_root: Path) -> AsyncIterator[EmbeddedDesktop]:
    """A desktop that is up; closed at the block's end, and failing the test if that takes too long to come."""
    desktop = EmbeddedDesktop(config, "desktop", run_root)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await desktop.start()
            yield desktop
    finally:
        await desktop.close()
