"""Lifecycle of desktops in Docker containers: create at each reset, wait until ready, remove."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Address, Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.docker_client import Container

_log = logging.getLogger(__name__)
_GUEST_PORT = 5000
_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_TIMEOUT_FRACTION = 0.95  # fail with a specific error shortly before the caller's deadline cancels the start


class ContainerDesktop(Desktop):
    """Base class of desktops in containers; the operations come from the provider's other base class.

    Args:
        name: desktop name, unique in the run.
        run_root: folder of all desktops of the run, by which containers are attributed to the run.
        start_timeout_s: time in seconds from the creation of the container to a guest server that responds.
    """

    def __init__(self, name: str, run_root: Path, start_timeout_s: float) -> None:
        self._name = name
        self._run_root = run_root
        self._start_timeout_s = start_timeout_s
        self._num_started = 0
        self._container: Container | None = None

    @abstractmethod
    def _container_options(self) -> dict[str, Any]:
        """Return the options for the docker SDK, including `image`."""

    @abstractmethod
    async def _check_ready(self) -> None:
        """Raise DesktopError if the guest server does not respond yet."""

    @property
    def ports(self) -> Sequence[int]:
        """Published ports of the guest; the first one is the guest server's."""
        return (_GUEST_PORT,)

    @property
    def address(self) -> Address:
        """Address of the guest server."""
        if self._container is None:
            raise DesktopGone("the desktop is not running")
        return self._container.address(self.ports[0])

    async def start(self) -> None:
        """Start the desktop and return when a screenshot can be taken."""
        if self._container is not None:
            raise DesktopError("the desktop is already started")
        deadline = time.monotonic() + _TIMEOUT_FRACTION * self._start_timeout_s
        self._num_started += 1
        name = f"deskrl-{self._name}-{self._num_started}"
        self._container = Container(name, self._run_root, self._container_options(), self.ports)
        await self._container.start()
        pause_s = _FIRST_POLL_S
        while (error := await self._probe(deadline)) is not None:
            await self._container.check_running()
            if time.monotonic() + pause_s > deadline:
                limit_s = self._start_timeout_s
                raise DesktopError(f"the guest of {name} was not ready within {limit_s:g} s: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)

    async def reset(self) -> None:
        """Restore the initial state by a new container."""
        await self._terminate()
        await self.start()

    async def close(self) -> None:
        """Remove the container with everything in it."""
        try:
            await self._terminate()
        except DesktopError:  # the caller no longer needs it, and the next actor removes orphaned containers
            _log.exception("cannot close desktop %s", self._name)

    async def _terminate(self) -> None:
        if self._container is not None:
            await self._container.remove()
            self._container = None

    async def _probe(self, deadline: float) -> DesktopError | None:
        """Return None if the guest is ready, else the reason why it is not."""
        try:
            async with asyncio.timeout(max(_FIRST_POLL_S, deadline - time.monotonic())):
                await self._check_ready()
        except DesktopError as error:
            return error
        except TimeoutError:
            return DesktopError("the guest server does not respond")
        return None
