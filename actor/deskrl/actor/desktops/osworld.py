"""Provider `osworld`: OSWorld's official virtual machine in a Docker container.

Every reset creates a new container, which boots the virtual machine from its unmodified disk. Between episodes the
container is paused, so that it uses no processor time and the guest's screen does not lock during training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.container_desktop import ContainerDesktop
from deskrl.actor.desktops.docker_client import check_image_exists, reap_containers
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.core.config import DesktopConfig, OSWorldConfig
from deskrl.core.errors import UserError

_KVM = Path("/dev/kvm")
_MIN_START_TIMEOUT_S = 120.0


class OSWorldDesktop(ContainerDesktop, OSWorldGuestDesktop):
    """One virtual machine in a container.

    Args:
        config: desktop configuration; its section `osworld` names image, disk and size.
        name: desktop name, unique in the run.
        run_root: folder of all desktops of the run, by which containers are attributed to the run.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        ContainerDesktop.__init__(self, name, run_root, config.start_timeout_s)
        OSWorldGuestDesktop.__init__(self, config)
        self._is_paused = False

    @property
    def ports(self) -> Sequence[int]:
        """Published ports: guest server, Chromium's debugging port, VLC's web interface, and VNC in a browser."""
        return 5000, 9222, 8080, 8006

    async def idle(self) -> None:
        """Pause the virtual machine until the next request."""
        if self._config.osworld.pause_when_idle and self._container is not None and not self._is_paused:
            await self._container.pause()
            self._is_paused = True

    async def wake(self) -> None:
        """Resume the virtual machine if it is paused."""
        if self._is_paused and self._container is not None:
            await self._container.unpause()
            self._is_paused = False

    async def _terminate(self) -> None:
        await super()._terminate()
        self._is_paused = False
        self._has_input_code = False

    async def _check_ready(self) -> None:
        await self.screenshot()

    def _container_options(self) -> dict[str, Any]:
        return container_options(self._config.osworld)


def container_options(config: OSWorldConfig) -> dict[str, Any]:
    """Return docker options of the official image: its disk read-only, and /dev/kvm if enabled and available."""
    with_kvm = config.kvm != "off" and _KVM.exists()
    environment = {"DISK_SIZE": "32G", "RAM_SIZE": f"{config.ram_bytes // 1024**2}M", "CPU_CORES": str(config.cpus)}
    return {
        "image": config.image,
        "environment": environment if with_kvm else environment | {"KVM": "N"},
        "devices": [f"{_KVM}:{_KVM}:rwm"] if with_kvm else [],
        "cap_add": ["NET_ADMIN"],
        "volumes": {str(config.disk): {"bind": "/System.qcow2", "mode": "ro"}},
    }


class OSWorldProvider(DesktopProvider):
    """Provider `osworld`."""

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> OSWorldDesktop:
        """Create a desktop without starting it."""
        return OSWorldDesktop(config, name, run_root)

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if a requirement of the virtual machine is not met on this machine."""
        disk = config.osworld.disk
        if disk is None or not disk.is_file():
            reason = "desktop.osworld.disk is unset" if disk is None else f"desktop.osworld.disk: {disk}: not found"
            raise UserError(reason, "set it to the disk of OSWorld's virtual machine (Ubuntu.qcow2)")
        if config.osworld.kvm == "require" and not os.access(_KVM, os.R_OK | os.W_OK):
            reason = "is not accessible for this user" if _KVM.exists() else "does not exist"
            raise UserError(
                f"desktop.osworld.kvm = require, but {_KVM} {reason}",
                "use a machine with hardware virtualisation, or set desktop.osworld.kvm = auto",
            )
        if config.start_timeout_s < _MIN_START_TIMEOUT_S:
            raise UserError(
                f"desktop.start_timeout_s = {config.start_timeout_s:g}: too short to boot a virtual machine",
                f"set it to at least {_MIN_START_TIMEOUT_S:g}, and higher without KVM",
            )
        check_image_exists(config.osworld.image)

    def reap(self, config: DesktopConfig, options: Any, run_root: Path) -> int:
        """Remove the run's containers whose actor was killed; return their number."""
        return reap_containers(run_root)
