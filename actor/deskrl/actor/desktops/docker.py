"""The provider `docker`: the embedded desktop as a container of an image built by deploy/docker/. Knows no task.

Every reset is a new container, as it is a new sandbox for `embedded`: its file system is read-only but for a home
folder and temporary folders in memory, which end with it. It has no network unless the configuration names one, and
is spoken to without any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.client import checked, request
from deskrl.actor.desktops.container_life import ContainerLife
from deskrl.actor.desktops.door import Door
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.core.config import DesktopConfig

_USER = "uid=1000,gid=1000"
_HOME_BYTES = 512 * 1024**2
_SHARED_BYTES = 256 * 1024**2
_DOOR = "/run/door.sock"
_KNOCK_S = 1.0
"""How long a guest is waited for before its container is looked at again."""


class DockerDesktop(ContainerLife, GuestDesktop):
    """One desktop in a container.

    Args:
        config: size, limits and patience; its section `docker` names image and network.
        name: its name, unique in the run.
        run_root: folder of all desktops of the run, by which containers know their run.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        ContainerLife.__init__(self, name, run_root, config.start_timeout_s)
        GuestDesktop.__init__(self, config)
        self._door = Door(run_root / name)

    @property
    def ports(self) -> Sequence[int]:
        """None: nothing of it is published."""
        return ()

    @property
    def address(self) -> Address:
        """Where the guest server listens."""
        if self._container is None:
            raise DesktopGone("the desktop is not running")
        return self._door.socket_path

    async def start(self) -> None:
        """Bring it up: returns when a screenshot can be taken."""
        if self._container is not None:
            raise DesktopError("already started")
        self._door.open()
        try:
            await super().start()
        finally:
            self._door.shut()

    async def _end(self) -> None:
        await super()._end()
        self._door.remove()

    async def _answer(self) -> None:
        await self._door.hand_over(_KNOCK_S)
        checked(await request(self.address, "GET", "/deskrl/health"))

    def _container_options(self) -> dict[str, Any]:
        config = self._config
        guest = {"door": _DOOR, "width": config.width, "height": config.height}
        return {
            "image": config.docker.image,
            "command": [json.dumps(guest | {"max_processes": None, "max_data_bytes": None})],
            "network": config.docker.network,
            "mounts": [{"Type": "bind", "Source": str(self._door.path), "Target": _DOOR, "ReadOnly": True}],
            "mem_limit": config.memory_bytes,
            "memswap_limit": config.memory_bytes,
            "pids_limit": config.max_processes,
            "nano_cpus": int(config.docker.cpus * 1e9) if config.docker.cpus else None,
            "read_only": True,
            "tmpfs": {
                "/home/user": f"exec,mode=755,size={_HOME_BYTES},{_USER}",
                "/tmp": f"exec,mode=1777,size={_HOME_BYTES}",
                "/run": f"mode=755,size={_SHARED_BYTES},{_USER}",
            },
            "shm_size": _SHARED_BYTES,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "init": True,
        }
