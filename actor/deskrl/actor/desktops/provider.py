"""From a configuration to a desktop. Knows which providers there are."""

from __future__ import annotations

from pathlib import Path

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError


def make_desktop(config: DesktopConfig, name: str, run_root: Path) -> Desktop:
    """A desktop that is not started yet.

    Args:
        config: the run's section `desktop`; names the provider.
        name: unique among the run's desktops; becomes a folder's name.
        run_root: folder of all desktops of the run, short enough for the names of sockets.

    Raises:
        UserError: this machine lacks packages that the provider needs.
    """
    if config.provider == "simulated":
        return SimulatedDesktop(config, name)
    from deskrl.actor.desktops.embedded import EmbeddedDesktop

    missing = missing_packages(applications=False)
    if missing:
        raise UserError(
            f"the embedded desktop needs Debian packages that are not installed: {', '.join(missing)}",
            f"run: apt-get install {' '.join(missing)}",
        )
    return EmbeddedDesktop(config, name, run_root)
