"""Provider `docker`: desktops as containers of the image that deploy/docker/ builds.

Every reset creates a new container. Its file system is read-only except for a home folder and temporary folders in
memory, which are removed with the container. It has no network unless the configuration names one: the actor reaches
the guest server through a Unix socket.

The guest server runs as root of the container, with the capabilities to change users and to end processes only. The
programs of the desktop run as another user, without capabilities, so that they cannot reach it.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from deskrl.actor.desktops.account_files import account_files
from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.container_desktop import ContainerDesktop
from deskrl.actor.desktops.docker_client import check_image_exists, reap_containers
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.actor.desktops.kernel_users import KernelUser
from deskrl.actor.desktops.provider import DesktopDurations, DesktopProvider
from deskrl.actor.desktops.socket_handoff import LONGEST_SOCKET_NAME, SocketHandoff
from deskrl.actor.guest.limits import NUM_RESERVED_PROCESSES, RESERVED_BYTES, X_MEMORY_FRACTION
from deskrl.actor.guest.session_sandbox import RUNTIME
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError

_HOME_BYTES = 512 * 1024**2
_SHARED_BYTES = 256 * 1024**2
_HANDOFF_PATH = "/run/handoff.sock"
_INSPECT_TIMEOUT_S = 10.0
_HANDOFF_POLL_S = 1.0
"""Time in seconds to wait for the guest before the state of its container is checked again."""


class DockerDesktop(ContainerDesktop, GuestDesktop):
    """One desktop in a container.

    Args:
        config: desktop configuration; its section `docker` names image and network.
        name: desktop name, unique in the run.
        run_root: folder of all desktops of the run, by which containers are attributed to the run.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        ContainerDesktop.__init__(self, name, run_root, config.start_timeout_s)
        GuestDesktop.__init__(self, config)
        self._handoff = SocketHandoff(run_root / name)
        self._user: KernelUser | None = None
        self._was_closed = False

    @property
    def ports(self) -> Sequence[int]:
        """Published ports: none."""
        return ()

    @property
    def address(self) -> Address:
        """Address of the guest server."""
        if self._container is None:
            raise DesktopGone("the desktop is not running")
        return self._handoff.guest_socket_path

    async def start(self) -> None:
        """Start the desktop and return when a screenshot can be taken."""
        if self._container is not None:
            raise DesktopError("the desktop is already started")
        self._was_closed = False
        if self._user is None:
            self._user = KernelUser.acquire()
        self._handoff.open()
        for name, text in account_files(self._user.user_id).items():
            (self._handoff.path.parent / name).write_text(text, encoding="ascii")
        try:
            await super().start()
        finally:
            self._handoff.close()

    async def close(self) -> None:
        """Remove the container with everything in it."""
        self._was_closed = self._container is not None
        await super().close()
        if self._user is not None:
            self._user.release()
            self._user = None

    @property
    def can_observe_host(self) -> bool:
        """True: the docker daemon of this machine reports how a container ended."""
        return True

    async def death_cause(self) -> str | None:
        """Return evidence that the container was ended from outside.

        Programs of the desktop cannot send a signal to the guest server. If a signal ended it, and the container has
        not reached its memory limit, the sender was outside.
        """
        if self._was_closed:
            return "the actor closed the desktop"
        if self._container is None:
            return None
        try:
            async with asyncio.timeout(_INSPECT_TIMEOUT_S):
                end = await self._container.end()
        except DesktopGone:
            return "the container was removed"
        except (DesktopError, UserError, TimeoutError) as error:
            return f"the docker daemon does not respond: {one_line(error)}"
        if end is None or end.was_out_of_memory or end.exit_code - 128 not in (signal.SIGKILL, signal.SIGTERM):
            return None
        return f"the container was ended from outside by {signal.Signals(end.exit_code - 128).name}"

    async def _terminate(self) -> None:
        await super()._terminate()
        self._handoff.remove()

    async def _check_ready(self) -> None:
        await self._handoff.send_listener(_HANDOFF_POLL_S)
        await self.check_health(self._config.start_timeout_s)

    def _container_options(self) -> dict[str, Any]:
        assert self._user is not None, "acquired by `start`"
        return container_options(self._config, self._user.user_id, self._handoff.path)


def container_options(config: DesktopConfig, user_id: int, handoff: Path) -> dict[str, Any]:
    """Return docker options of one desktop.

    Args:
        config: desktop configuration.
        user_id: user and group of the programs of the desktop.
        handoff: handoff socket; the files `passwd` and `group` are beside it.
    """
    owner = f"uid={user_id},gid={user_id}"
    guest = {
        "handoff_socket": _HANDOFF_PATH,
        "width": config.width,
        "height": config.height,
        "session_user_id": user_id,
        "max_processes": config.max_processes,
        "max_data_bytes": config.memory_bytes,
        "max_x_data_bytes": config.memory_bytes // X_MEMORY_FRACTION,
        "max_file_bytes": config.max_file_bytes,
    }
    identity = {handoff.parent / name: f"/etc/{name}" for name in account_files(user_id)}
    memory_bytes = config.memory_bytes + config.memory_bytes // X_MEMORY_FRACTION + RESERVED_BYTES
    return {
        "image": config.docker.image,
        "command": [json.dumps(guest)],
        "network": config.docker.network,
        "mounts": [
            {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}
            for source, target in {handoff: _HANDOFF_PATH, **identity}.items()
        ],
        "mem_limit": memory_bytes,
        "memswap_limit": memory_bytes,
        "pids_limit": config.max_processes + NUM_RESERVED_PROCESSES,
        "nano_cpus": int(config.docker.cpus * 1e9) if config.docker.cpus else None,
        "read_only": True,
        "tmpfs": {
            "/home/user": f"exec,mode=755,size={_HOME_BYTES},{owner}",
            "/tmp": f"exec,mode=1777,size={_HOME_BYTES}",
            "/run": f"mode=755,size={_SHARED_BYTES}",
            RUNTIME: f"mode=700,size={_SHARED_BYTES},{owner}",
        },
        "shm_size": _SHARED_BYTES,
        "user": "0:0",
        "cap_drop": ["ALL"],
        "cap_add": ["SETUID", "SETGID", "KILL"],
        "security_opt": ["no-new-privileges"],
        "init": True,
    }


class DockerProvider(DesktopProvider):
    """Provider `docker`."""

    starts_within_seconds: ClassVar = True
    start_hint: ClassVar = "see the container's log (docker logs)"
    uses_machine_resources: ClassVar = True
    socket_name: ClassVar = LONGEST_SOCKET_NAME

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> DockerDesktop:
        """Create a desktop without starting it."""
        return DockerDesktop(config, name, run_root)

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if the docker daemon cannot be reached, or does not have the configured image."""
        check_image_exists(config.docker.image)

    def reap(self, config: DesktopConfig, options: Any, run_root: Path) -> int:
        """Remove the run's containers whose actor was killed; return their number."""
        return reap_containers(run_root)

    def durations(self, config: DesktopConfig, options: Any) -> DesktopDurations:
        """Return measured durations."""
        return DesktopDurations(reset_s=2.0, action_s=0.2, evaluation_s=0.2)
