"""Tries one desktop on this machine, for `deskrl doctor`: up, a screenshot, gone. Knows no task and no service."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider import make_desktop, refuse_unusable
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

_STARTED = ("embedded", "docker")
"""Providers whose desktops are up within seconds; of the others, what they need is looked for."""


def main(config: RunConfig) -> str:
    """What came of it, as one line.

    Raises:
        UserError: this machine lacks what the provider needs, or the desktop does not start.
    """
    refuse_unusable(config.desktop)
    if config.desktop.provider not in _STARTED:
        return "what it needs is here; none was started"
    with tempfile.TemporaryDirectory(prefix="deskrl-doctor-") as folder:
        desktop = make_desktop(config.desktop, "doctor", Path(folder))
        try:
            return asyncio.run(_try(desktop, config.desktop.start_timeout_s))
        except (DesktopError, TimeoutError) as error:
            reason = str(error) or f"it was not up within {config.desktop.start_timeout_s:g} s"
            raise UserError(
                f"a desktop does not start: {' '.join(reason.split())}", _MEND[config.desktop.provider]
            ) from error


_MEND = {
    "embedded": "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0), or choose another "
    "desktop.provider",
    "docker": "look at the container's log: docker logs",
}


async def _try(desktop: Desktop, timeout_s: float) -> str:
    started_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            await desktop.start()
            ready_s = time.monotonic() - started_s
            picture = await desktop.screenshot()
    finally:
        await desktop.close()
    return f"up in {ready_s:.1f} s, {picture.width}x{picture.height}"
