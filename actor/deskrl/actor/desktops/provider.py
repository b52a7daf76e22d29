"""From a configuration to a desktop. Knows which providers there are."""

from __future__ import annotations

from pathlib import Path

from deskrl.actor.desktops import containers, osworld, remote, vmware
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.docker import DockerDesktop
from deskrl.actor.desktops.orphans import reap_orphans
from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError


def make_desktop(config: DesktopConfig, name: str, run_root: Path) -> Desktop:
    """A desktop that is not started yet.

    Args:
        config: the run's section `desktop`; names the provider.
        name: unique among the run's desktops; becomes a folder's or a container's name.
        run_root: folder of all desktops of the run, short enough for the names of sockets.

    Raises:
        UserError: this machine lacks what the provider needs.
    """
    refuse_unusable(config)
    match config.provider:
        case "docker":
            return DockerDesktop(config, name, run_root)
        case "osworld":
            return osworld.OSWorldDesktop(config, name, run_root)
        case "vmware":
            return vmware.VMwareDesktop(config, run_root)
        case "remote":
            return remote.RemoteDesktop(config, run_root)
        case "simulated":
            return SimulatedDesktop(config, name)
        case "embedded":
            from deskrl.actor.desktops.embedded import EmbeddedDesktop

            return EmbeddedDesktop(config, name, run_root)


def refuse_unusable(config: DesktopConfig) -> None:
    """Raise UserError if this machine lacks what the provider needs."""
    match config.provider:
        case "docker":
            containers.refuse_missing_image(config.docker.image)
        case "osworld":
            osworld.refuse_unusable(config)
        case "vmware":
            vmware.refuse_unusable(config)
        case "remote":
            remote.refuse_unusable(config)
        case "embedded":
            if missing := missing_packages(applications=False):
                raise UserError(
                    f"the embedded desktop needs Debian packages that are not installed: {', '.join(missing)}",
                    f"run: apt-get install {' '.join(missing)}",
                )


def reap(config: DesktopConfig, run_root: Path) -> int:
    """End and remove desktops of the run that a killed actor left; how many there were."""
    if config.provider == "vmware":
        return vmware.reap_machines(config.vmware, run_root)
    num_containers = containers.reap_containers(run_root) if config.provider in ("docker", "osworld") else 0
    return max(num_containers, reap_orphans(run_root))  # a desktop of `docker` is a container and a folder
