"""The life of a desktop in a container: made anew at each reset, waited for, removed. Knows no guest's protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Address, Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.containers import Container

_LOGGER = logging.getLogger(__name__)
_PORT = 5000
_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_SHARE = 0.95  # so that this says what was wrong before the caller's own deadline cuts it off


class ContainerLife(Desktop):
    """What desktops in containers have in common; how a guest is asked is said by the other parent of a provider.

    Args:
        name: the desktop's name, unique in the run.
        run_root: folder of all desktops of the run, by which containers know their run.
        start_timeout_s: from nothing to a guest that answers.
    """

    def __init__(self, name: str, run_root: Path, start_timeout_s: float) -> None:
        self._name = name
        self._run_root = run_root
        self._start_timeout_s = start_timeout_s
        self._num_started = 0
        self._container: Container | None = None

    @abstractmethod
    def _container_options(self) -> dict[str, Any]:
        """How the container is run: options of the docker SDK, with `image`."""

    @abstractmethod
    async def _answer(self) -> None:
        """Ask the guest whether it is ready; raises DesktopError if not."""

    @property
    def ports(self) -> Sequence[int]:
        """Ports of the guest that are published; the guest server's is the first."""
        return (_PORT,)

    @property
    def address(self) -> Address:
        """Where the guest server listens."""
        if self._container is None:
            raise DesktopGone("the desktop is not running")
        return self._container.address(self.ports[0])

    async def start(self) -> None:
        """Bring it up: returns when a screenshot can be taken."""
        if self._container is not None:
            raise DesktopError("already started")
        deadline = time.monotonic() + _SHARE * self._start_timeout_s
        self._num_started += 1
        name = f"deskrl-{self._name}-{self._num_started}"
        self._container = Container(name, self._run_root, self._container_options(), self.ports)
        await self._container.start()
        pause_s = _FIRST_POLL_S
        while (error := await self._ask(deadline)) is not None:
            await self._container.refuse_ended()
            if time.monotonic() + pause_s > deadline:
                limit_s = self._start_timeout_s
                raise DesktopError(f"the guest of {name} was not ready in {limit_s:g} s: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)

    async def reset(self) -> None:
        """Back to the first state, in a new container."""
        await self._end()
        await self.start()

    async def close(self) -> None:
        """End it and everything of it."""
        try:
            await self._end()
        except DesktopError:  # the caller is done with it; the next actor's start finds what is left
            _LOGGER.exception("desktop %s did not close", self._name)

    async def _end(self) -> None:
        if self._container is not None:
            await self._container.remove()
            self._container = None

    async def _ask(self, deadline: float) -> DesktopError | None:
        """None once the guest is ready, else why it is not."""
        try:
            async with asyncio.timeout(max(_FIRST_POLL_S, deadline - time.monotonic())):
                await self._answer()
        except DesktopError as error:
            return error
        except TimeoutError:
            return DesktopError("the guest server gives no answer")
        return None
