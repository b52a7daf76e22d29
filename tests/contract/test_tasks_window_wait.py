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


def task(*commands: list[str]) -> Task:
    pause = {"type": "sleep", "parameters": {"seconds": 1}}
    launches = [{"type": "launch", "parameters": {"command": command}} for command in commands]
    config = [step for launch in launches for step in (launch, pause)][:-1]
    document = {"id": "t", "instruction": "-", "config": config, "evaluator": {"func": "infeasible"}}
    return parse_task(json.dumps(document).encode(), "t")


async def first_screenshot(desktop: Desktop, config: DesktopConfig, *commands: list[str]) -> Image.Image:
    """Set up a task that starts programs one after the other, and return what the policy sees first."""
    await setup_task(desktop, task(*commands), 0, config)
    return await desktop.settle()


async def first_screenshot_of(
    provider: str, run_root: Path, config: DesktopConfig, *commands: list[str]
) -> Image.Image:
    """Return what the policy sees first on an embedded desktop, directly or as a remote guest."""
    async with running_desktop(config, run_root) as desktop:
        assert isinstance(desktop, EmbeddedDesktop)
        if provider == "embedded":
            return await first_screenshot(desktop, config, *commands)
        async with forwarding_guest(desktop) as address:
            remote_config = RemoteConfig.model_validate({"addresses": [address]})
            config = config.model_copy(update={"provider": "remote", "num_envs": 1, "remote": remote_config})
            remote = make_desktop(config, "remote", run_root / "remote")
            await remote.start()
            try:
                return await first_screenshot(remote, config, *commands)
            finally:
                await remote.close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("provider", ["embedded", "remote"])
def test_the_first_screenshot_shows_the_page_of_a_browser(provider: str, run_root: Path) -> None:
    screen = asyncio.run(first_screenshot_of(provider, run_root, DesktopConfig(), BROWSER))
    assert screen.getpixel((100, 600)) == GREEN


@pytest.mark.skipif(shutil.which("mousepad") is None, reason="mousepad is not installed")
@pytest.mark.parametrize("provider", ["embedded", "remote"])
def test_a_window_behind_an_empty_part_of_another_one_is_not_waited_for(
    provider: str, run_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_front = ["xterm", "-geometry", "200x60+0+0"]
    asyncio.run(first_screenshot_of(provider, run_root, DesktopConfig(window_timeout_s=20), ["mousepad"], in_front))
    assert [record.getMessage() for record in caplog.records if "window" in record.getMessage()] == []


@pytest.mark.skipif(shutil.which("gimp") is None, reason="gimp is not installed")
def test_the_first_screenshot_shows_no_splash_screen(run_root: Path) -> None:
    async def scenario() -> list[tuple[str, bool]]:
        config = DesktopConfig(window_timeout_s=50)
        async with running_desktop(config, run_root) as desktop:
            await first_screenshot(desktop, config, ["gimp"])
            return [(window["title"], window["is_splash"]) for window in await desktop.windows()]

    assert asyncio.run(scenario()) == [("GNU Image Manipulation Program", False)]
