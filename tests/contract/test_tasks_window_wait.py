"""Setups end when the applications that they started show complete windows, on embedded and on remote guests."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from desktop_kit import running_desktop
from PIL import Image
from remote_guest_kit import forwarding_guest

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.task import Task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig, RemoteConfig

GREEN = (0, 128, 0)
PAGE = "data:text/html,<body style='background:green'>text"
BROWSER = ["chromium", f"--app={PAGE}", "--start-maximized"]


def task(*command: str) -> Task:
    config = [{"type": "launch", "parameters": {"command": list(command)}}]
    document = {"id": "t", "instruction": "-", "config": config, "evaluator": {"func": "infeasible"}}
    return parse_task(json.dumps(document).encode(), "t")


async def first_screenshot(desktop: Desktop, command: list[str], config: DesktopConfig) -> Image.Image:
    """Set up a task that starts one program, and return what the policy sees first."""
    await setup_task(desktop, task(*command), 0, config)
    return await desktop.settle()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("provider", ["embedded", "remote"])
def test_the_first_screenshot_shows_the_page_of_a_browser(provider: str, run_root: Path) -> None:
    async def scenario() -> Image.Image:
        config = DesktopConfig()
        async with running_desktop(config, run_root) as desktop:
            assert isinstance(desktop, EmbeddedDesktop)
            if provider == "embedded":
                return await first_screenshot(desktop, BROWSER, config)
            async with forwarding_guest(desktop) as address:
                config = DesktopConfig(provider="remote", num_envs=1, remote=RemoteConfig(addresses=(address,)))
                remote = make_desktop(config, "remote", run_root / "remote")
                await remote.start()
                try:
                    return await first_screenshot(remote, BROWSER, config)
                finally:
                    await remote.close()

    screen = asyncio.run(scenario())
    assert screen.getpixel((100, 600)) == GREEN


@pytest.mark.skipif(shutil.which("gimp") is None, reason="gimp is not installed")
def test_the_first_screenshot_shows_no_splash_screen(run_root: Path) -> None:
    async def scenario() -> list[tuple[str, bool]]:
        config = DesktopConfig(window_timeout_s=50)
        async with running_desktop(config, run_root) as desktop:
            await first_screenshot(desktop, ["gimp"], config)
            return [(window["title"], window["is_splash"]) for window in await desktop.windows()]

    assert asyncio.run(scenario()) == [("GNU Image Manipulation Program", False)]
