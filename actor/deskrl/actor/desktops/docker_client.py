"""Containers of desktops, managed through the docker SDK.

Every container is labelled with its run and with the process that created it, so that the next actor can remove the
containers of an actor that was killed. Docker chooses the published ports, bound to this machine's loopback interface,
so that containers which start at the same time cannot collide. Volumes that an image declares are removed with their
container.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.orphan_cleanup import OwnerRecord
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError, missing_package

_RUN_LABEL = "deskrl.run"
_OWNER_LABEL = "deskrl.owner"
_LOOPBACK = "127.0.0.1"
_NUM_LOG_LINES = 5

_T = TypeVar("_T")


@dataclass(frozen=True)
class ContainerEnd:
    """How a container ended, as reported by docker."""

    exit_code: int
    """Exit status of its first process; 128 + the number of a signal that ended it."""
    was_out_of_memory: bool
    """Whether a process of it was killed because the container reached its memory limit."""


class Container:
    """One container, identified by a name that is chosen before it is created.

    Args:
        name: container name, unique on this machine.
        run_root: folder of the run's desktops, which identifies the run.
        options: options of `docker.models.containers.ContainerCollection.run`, including `image`.
        ports: TCP ports of the guest to publish.
    """

    def __init__(self, name: str, run_root: Path, options: dict[str, Any], ports: Sequence[int]) -> None:
        self.name = name
        self._options = options | {
            "name": name,
            "labels": _labels(run_root),
            "ports": {f"{port}/tcp": (_LOOPBACK, None) for port in ports},
        }
        self._creation: asyncio.Future[Any] | None = None
        self._addresses: dict[int, tuple[str, int]] = {}

    async def start(self) -> None:
        """Create and start the container; raises DesktopError if docker reports an error."""
        self._creation = asyncio.ensure_future(asyncio.to_thread(self._run))
        # A thread cannot be cancelled: `remove` waits for it, so that it cannot start a container unnoticed.
        self._addresses = await asyncio.shield(self._creation)

    def address(self, port: int) -> tuple[str, int]:
        """Return the host address of a published guest port; raises DesktopGone if the container does not run."""
        if port not in self._addresses:
            raise DesktopGone("the container is not running")
        return self._addresses[port]

    async def pause(self) -> None:
        """Suspend all processes of the container."""
        await self._with_container(lambda container: container.pause())

    async def unpause(self) -> None:
        """Resume all processes of the container."""
        await self._with_container(lambda container: container.unpause())

    async def check_running(self) -> None:
        """Raise DesktopGone with the end of the container's log if it is neither running nor paused."""

        def status_and_log(container: Any) -> tuple[str, str]:
            return container.status, container.logs(tail=_NUM_LOG_LINES).decode("utf-8", "replace")

        status, log = await self._with_container(status_and_log)
        if status not in ("running", "paused"):
            raise DesktopGone(f"container {self.name} is {status}: {' '.join(log.split()) or 'its log is empty'}")

    async def end(self) -> ContainerEnd | None:
        """Return how the container ended; None if it runs. Raises DesktopGone if it does not exist."""

        def state(container: Any) -> ContainerEnd | None:
            state = container.attrs["State"]
            if state["Status"] in ("running", "paused"):
                return None
            return ContainerEnd(int(state["ExitCode"]), bool(state.get("OOMKilled")))

        return await self._with_container(state)

    async def remove(self) -> None:
        """Remove the container with its volumes. Does nothing if it does not exist."""
        self._addresses = {}
        if self._creation is not None:
            await asyncio.wait({self._creation})
            self._creation = None
            await asyncio.to_thread(_remove, self.name)

    async def _with_container(self, operation: Callable[[Any], _T]) -> _T:
        """Call `operation` with the SDK's container object in a thread and return its result."""

        def call() -> _T:
            with _as_desktop_errors(self.name):
                return operation(connect().containers.get(self.name))

        return await asyncio.to_thread(call)

    def _run(self) -> dict[int, tuple[str, int]]:
        with _as_desktop_errors(self.name):
            container = connect().containers.run(detach=True, **self._options)
            container.reload()
        published = container.attrs["NetworkSettings"]["Ports"] or {}
        return {
            int(port.partition("/")[0]): (_LOOPBACK, int(bindings[0]["HostPort"]))
            for port, bindings in published.items()
            if bindings
        }


@contextmanager
def _as_desktop_errors(name: str) -> Iterator[None]:
    """Convert errors of the docker SDK to desktop errors."""
    import docker

    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise DesktopError(f"the image of container {name} no longer exists: {_explain(error)}") from error
    except docker.errors.NotFound as error:
        raise DesktopGone(f"container {name} does not exist") from error
    except (docker.errors.DockerException, OSError) as error:
        raise DesktopError(f"docker error for container {name}: {_explain(error)}") from error


@cache
def connect() -> Any:
    """Return the client of this machine's docker daemon (DOCKER_HOST, or the default socket).

    Raises:
        UserError: the docker SDK is not installed, the daemon is unreachable, or this user may not use it.
    """
    try:
        import docker
    except ModuleNotFoundError as error:
        raise missing_package("docker", "actor") from error
    try:
        return docker.from_env(max_pool_size=64)
    except docker.errors.DockerException as error:
        address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if "Permission denied" in str(error):
            raise UserError(
                f"this user may not use the docker daemon at {address}", "add the user to the group docker, or use root"
            ) from error
        raise UserError(
            f"no docker daemon responds at {address}", "start it (dockerd), or choose another desktop.provider"
        ) from error


def check_image_exists(image: str) -> None:
    """Raise UserError if the docker daemon is unreachable or does not have the image. Images are never pulled."""
    client = connect()
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound as error:
        raise UserError(
            f"docker image {image}: not found on this machine",
            f"build it (deploy/docker/build.sh) or fetch it (docker pull {image})",
        ) from error


def reap_containers(run_root: Path) -> int:
    """Remove the run's containers whose owner was a process of this machine that has ended; return their number."""
    num_reaped = 0
    for container in connect().containers.list(all=True, filters={"label": f"{_RUN_LABEL}={run_root.absolute()}"}):
        host, pid, ticks = container.labels[_OWNER_LABEL].rsplit(".", 2)
        if host == socket.gethostname() and not OwnerRecord(int(pid), int(ticks), ()).is_owner_alive:
            _remove(container.name)
            num_reaped += 1
    return num_reaped


def _labels(run_root: Path) -> dict[str, str]:
    owner = OwnerRecord.for_this_process(())
    return {
        _RUN_LABEL: str(run_root.absolute()),
        _OWNER_LABEL: f"{socket.gethostname()}.{owner.owner_pid}.{owner.owner_start_ticks}",
    }


def _remove(name: str) -> None:
    with contextlib.suppress(DesktopGone), _as_desktop_errors(name):
        connect().containers.get(name).remove(force=True, v=True)


def _explain(error: Exception) -> str:
    return one_line(getattr(error, "explanation", None) or error)
