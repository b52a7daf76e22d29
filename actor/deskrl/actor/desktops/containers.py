"""Containers of desktops through the docker SDK: made, waited for, paused, removed. Knows no guest protocol.

Every container carries the run that it belongs to and the process that made it as labels, so that what a killed actor
left is found and removed at the next start. Its ports are chosen by docker, bound to this machine's loopback and read
back: two that start together cannot meet. Volumes that an image asks for go with their container.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.orphans import Record
from deskrl.core.errors import UserError, missing_package

_RUN_LABEL = "deskrl.run"
_OWNER_LABEL = "deskrl.owner"
_LOOPBACK = "127.0.0.1"
_LOG_LINES = 5

_T = TypeVar("_T")


class Container:
    """One container, known by its name before it exists.

    Args:
        name: of the container, unique on the machine.
        run_root: folder of the run's desktops, which names the run.
        options: of `docker.models.containers.ContainerCollection.run`, with `image`.
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
        """Make and start it; raises DesktopError if docker does not."""
        self._creation = asyncio.ensure_future(asyncio.to_thread(self._run))
        # A thread cannot be cancelled: `remove` waits for it, lest it bring up a container that nobody knows.
        self._addresses = await asyncio.shield(self._creation)

    def address(self, port: int) -> tuple[str, int]:
        """Where a port of the guest is reached; raises DesktopGone if there is no container."""
        if port not in self._addresses:
            raise DesktopGone("the container is not running")
        return self._addresses[port]

    async def pause(self) -> None:
        """Stop its processors."""
        await self._do(lambda container: container.pause())

    async def unpause(self) -> None:
        """Let them go on."""
        await self._do(lambda container: container.unpause())

    async def refuse_ended(self) -> None:
        """Raise DesktopGone, with the last that it wrote, if it does not run (any more)."""

        def last_words(container: Any) -> tuple[str, str]:
            return container.status, container.logs(tail=_LOG_LINES).decode("utf-8", "replace")

        status, written = await self._do(last_words)
        if status not in ("running", "paused"):
            raise DesktopGone(
                f"the container {self.name} is {status}: {' '.join(written.split()) or 'it wrote nothing'}"
            )

    async def remove(self) -> None:
        """Remove it with its volumes; nothing happens if there is none."""
        self._addresses = {}
        if self._creation is not None:
            await asyncio.wait({self._creation})
            self._creation = None
            await asyncio.to_thread(_remove, self.name)

    async def _do(self, work: Callable[[Any], _T]) -> _T:
        """What `work` makes of the container, in a thread."""

        def found() -> _T:
            with _as_desktop_errors(self.name):
                return work(connect().containers.get(self.name))

        return await asyncio.to_thread(found)

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
    """What docker says against a container becomes an error of its desktop."""
    import docker

    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise DesktopError(f"the image of {name} is gone: {_told(error)}") from error
    except docker.errors.NotFound as error:
        raise DesktopGone(f"there is no container {name}") from error
    except (docker.errors.DockerException, OSError) as error:
        raise DesktopError(f"docker refuses with {name}: {_told(error)}") from error


@cache
def connect() -> Any:
    """The client of this machine's docker daemon (DOCKER_HOST, or its usual socket).

    Raises:
        UserError: no such package, no daemon, or no right to use it.
    """
    try:
        import docker
    except ModuleNotFoundError as error:
        raise missing_package("docker", "actor") from error
    try:
        return docker.from_env(max_pool_size=64)
    except docker.errors.DockerException as error:
        place = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if "Permission denied" in str(error):
            raise UserError(
                f"this user may not use the docker daemon at {place}", "add the user to the group docker, or use root"
            ) from error
        raise UserError(
            f"there is no docker daemon at {place}",
            "start one (dockerd), or choose another desktop.provider",
        ) from error


def refuse_missing_image(image: str) -> None:
    """Raise UserError if the daemon has no such image, or is not there."""
    client = connect()
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound as error:  # nothing is pulled behind a run's back
        raise UserError(
            f"there is no docker image {image} on this machine",
            f"build it (deploy/docker/build.sh) or fetch it (docker pull {image})",
        ) from error


def reap_containers(run_root: Path) -> int:
    """Remove the run's containers whose owner was a process of this machine that is gone; how many there were."""
    num_reaped = 0
    for container in connect().containers.list(all=True, filters={"label": f"{_RUN_LABEL}={run_root.absolute()}"}):
        host, pid, ticks = container.labels[_OWNER_LABEL].rsplit(".", 2)
        if host == socket.gethostname() and not Record(int(pid), int(ticks), ()).owner_lives:
            _remove(container.name)
            num_reaped += 1
    return num_reaped


def _labels(run_root: Path) -> dict[str, str]:
    owner = Record.of_this_process(())
    return {
        _RUN_LABEL: str(run_root.absolute()),
        _OWNER_LABEL: f"{socket.gethostname()}.{owner.owner_pid}.{owner.owner_start_ticks}",
    }


def _remove(name: str) -> None:
    with contextlib.suppress(DesktopGone), _as_desktop_errors(name):
        connect().containers.get(name).remove(force=True, v=True)


def _told(error: Exception) -> str:
    return " ".join(str(getattr(error, "explanation", None) or error).split())
