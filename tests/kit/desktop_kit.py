"""A real desktop, of whichever provider, for the length of a test, in a folder that leaves with it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.provider import make_desktop
from deskrl.core.config import DesktopConfig

DEADLINE_S = 60.0


@pytest.fixture
def run_root() -> Iterator[Path]:
    """Where desktops keep their folders; short, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        yield Path(folder) / "desktops"


@asynccontextmanager
async def running_desktop(config: DesktopConfig, run_root: Path, name: str = "desktop") -> AsyncIterator[Desktop]:
    """A desktop that is up; closed at the block's end, and failing the test if that takes too long to come."""
    desktop = make_desktop(config, name, run_root)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await desktop.start()
            yield desktop
    finally:
        await desktop.close()
