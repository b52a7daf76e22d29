"""The provider `osworld`: OSWorld's official virtual machine in a container, by the docker SDK. Knows no task.

A reset is a new container, which boots the virtual machine from its unchanged disk. Between episodes it is paused: it
takes no processor time, and the guest's screen does not lock itself while the learner is at work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.client import checked, request
from deskrl.actor.desktops.container_life import ContainerLife
from deskrl.actor.desktops.containers import refuse_missing_image
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.core.config import DesktopConfig, OSWorldConfig
from deskrl.core.errors import UserError

_KVM = Path("/dev/kvm")
_LEAST_START_S = 120.0


class OSWorldDesktop(ContainerLife, OSWorldGuestDesktop):
    """One virtual machine in a container.

    Args:
        config: patience; its section `osworld` names image, disk and size.
        name: its name, unique in the run.
        run_root: folder of all desktops of the run, by which containers know their run.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        ContainerLife.__init__(self, name, run_root, config.start_timeout_s)
        OSWorldGuestDesktop.__init__(self, config)
        self._is_paused = False

    @property
    def ports(self) -> Sequence[int]:
        """The guest server, Chromium's debugging, VLC's web interface, and VNC in a browser."""
        return 5000, 9222, 8080, 8006

    async def idle(self) -> None:
        """Pause it until the next request."""
        if self._config.osworld.pause and self._container is not None and not self._is_paused:
            await self._container.pause()
            self._is_paused = True

    async def wake(self) -> None:
        """Let it go on if it is paused."""
        if self._is_paused and self._container is not None:
            await self._container.unpause()
            self._is_paused = False

    async def _end(self) -> None:
        await super()._end()
        self._is_paused = False
        self._has_hands = False

    async def _answer(self) -> None:
        checked(await request(self.address, "GET", "/screenshot"))

    def _container_options(self) -> dict[str, Any]:
        return container_options(self._config.osworld)


def container_options(config: OSWorldConfig) -> dict[str, Any]:
    """How the official image is run: its disk read-only, and /dev/kvm where it may and can be used."""
    with_kvm = config.kvm != "off" and _KVM.exists()
    environment = {"DISK_SIZE": "32G", "RAM_SIZE": f"{config.ram_bytes // 1024**2}M", "CPU_CORES": str(config.cpus)}
    return {
        "image": config.image,
        "environment": environment if with_kvm else environment | {"KVM": "N"},
        "devices": [f"{_KVM}:{_KVM}:rwm"] if with_kvm else [],
        "cap_add": ["NET_ADMIN"],
        "volumes": {str(config.disk): {"bind": "/System.qcow2", "mode": "ro"}},
    }


def refuse_unusable(config: DesktopConfig) -> None:
    """Raise UserError for what the virtual machine needs and this machine lacks."""
    disk = config.osworld.disk
    if disk is None or not disk.is_file():
        reason = "desktop.osworld.disk is unset" if disk is None else f"desktop.osworld.disk: {disk}: no such file"
        raise UserError(reason, "name the disk of OSWorld's virtual machine (Ubuntu.qcow2)")
    if config.osworld.kvm == "require" and not os.access(_KVM, os.R_OK | os.W_OK):
        raise UserError(
            f"desktop.osworld.kvm = require, and {_KVM} " + ("may not be used" if _KVM.exists() else "is not there"),
            "use a machine with hardware virtualisation, or set desktop.osworld.kvm = auto",
        )
    if config.start_timeout_s < _LEAST_START_S:
        raise UserError(
            f"no virtual machine boots in desktop.start_timeout_s = {config.start_timeout_s:g}",
            f"set it to {_LEAST_START_S:g} at least; without KVM to more",
        )
    refuse_missing_image(config.osworld.image)
