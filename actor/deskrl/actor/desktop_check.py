"""Trial of one desktop on this machine for `deskrl doctor`: start it, take a screenshot, close it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop, select_provider
from deskrl.core.config import RunConfig
from deskrl.core.error_text import one_line, typed_line
from deskrl.core.errors import UserError


def try_desktop(config: RunConfig) -> str:
    """Check the requirements of the configured provider and, if its desktops start within seconds, start one.

    Args:
        config: run configuration.

    Returns:
        The outcome in one line.

    Raises:
        UserError: this machine lacks a requirement of the provider, or the desktop does not start.
    """
    check_usable(config.desktop)
    provider = select_provider(config.desktop).provider
    if not provider.starts_within_seconds:
        return "requirements are met; no desktop was started"
    with tempfile.TemporaryDirectory(prefix="deskrl-doctor-") as folder:
        desktop = make_desktop(config.desktop, "doctor", Path(folder))
        try:
            return asyncio.run(_time_start(desktop, config.desktop.start_timeout_s))
        except TimeoutError as error:
            reason = f"not ready within {config.desktop.start_timeout_s:g} s"
            raise UserError(f"the desktop did not start: {reason}", provider.start_hint) from error
        except UserError:
            raise
        except Exception as error:  # a desktop of the user's own may raise anything
            reason = one_line(error) if isinstance(error, DesktopError) else typed_line(error)
            raise UserError(f"the desktop did not start: {reason}", provider.start_hint) from error


async def _time_start(desktop: Desktop, timeout_s: float) -> str:
    started_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            await desktop.start()
            ready_s = time.monotonic() - started_s
            screenshot = await desktop.screenshot()
    finally:
        await desktop.close()
    return f"started in {ready_s:.1f} s, {screenshot.width}x{screenshot.height} pixels"
