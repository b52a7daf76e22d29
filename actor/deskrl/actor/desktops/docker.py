"""The provider `docker`: the embedded desktop as a container of an image built by deploy/docker/. Knows no task.

Every reset is a new container, as it is a new sandbox for `embedded`: its file system is read-only but for a home
folder and temporary folders in memory, which end with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.client import checked, request
from deskrl.actor.desktops.container_life import ContainerLife
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.core.config import DesktopConfig

_USER = "uid=1000,gid=1000"
_HOME_BYTES = 512 * 1024**2
_SHARED_BYTES = 256 * 1024**2


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

    async def _answer(self) -> None:
        checked(await request(self.address, "GET", "/deskrl/health"))

    def _container_options(self) -> dict[str, Any]:
        config = self._config
        guest = {"port": self.ports[0], "width": config.width, "height": config.height}
        return {
            "image": config.docker.image,
            "command": [json.dumps(guest | {"max_processes": None, "max_data_bytes": None})],
            "network": config.docker.network,
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
