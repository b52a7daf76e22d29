"""Desktop handle: what a reward may do with the desktop of an ended episode, from coroutines or from a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopGone
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import Evaluation, evaluate_task

_T = TypeVar("_T")


class DesktopHandle:
    """Access to a desktop while its episode is evaluated; operations are those of `Desktop`.

    An operation that fails raises DesktopError. Left uncaught, it counts as a state that cannot be read: the policy's
    failure after its first action. A lost desktop ends the evaluation even if the reward catches DesktopGone.

    Args:
        desktop: desktop in its end state.
    """

    def __init__(self, desktop: Desktop) -> None:
        self._desktop = desktop
        self._num_pending = 0
        self._is_closed = False
        self.lost: DesktopGone | None = None
        """Error of the operation that found that the desktop is lost."""

    @property
    def has_pending_operation(self) -> bool:
        """Whether an operation has not returned."""
        return self._num_pending > 0

    def close(self) -> None:
        """Reject further operations: the desktop is reset for another episode."""
        self._is_closed = True

    async def read_file(self, path: str) -> bytes:
        """Return a regular file; raises FileNotFoundError, also for links, devices and files that are too large."""
        with self._operation() as desktop:
            return await desktop.read_file(path)

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end, alone over the desktop's files unless the reward has `needs_session`."""
        with self._operation() as desktop:
            return await desktop.execute(command, shell=shell, timeout_s=timeout_s)

    async def screenshot(self) -> Image.Image:
        """Return the current screen at full size; it is what the policy left there, and no evidence."""
        with self._operation() as desktop:
            return await desktop.screenshot()

    async def windows(self) -> list[dict[str, Any]]:
        """Return the windows on the screen; empty unless the reward has `needs_session`."""
        with self._operation() as desktop:
            return await desktop.windows()

    async def evaluate_task(self, task: Task, final_action: Action | None) -> Evaluation:
        """Evaluate by the task's own evaluator, which stops all programs; for the kind `evaluators` only."""
        with self._operation() as desktop:
            return await evaluate_task(desktop, task, final_action)

    @contextlib.contextmanager
    def _operation(self) -> Iterator[Desktop]:
        if self._is_closed:
            raise RuntimeError("the evaluation of the episode has ended")
        self._num_pending += 1
        try:
            yield self._desktop
        except DesktopGone as error:
            self.lost = error
            raise
        finally:
            self._num_pending -= 1


class BlockingDesktopHandle:
    """The same operations for plain functions, which run in a thread.

    Args:
        handle: handle whose operations are run.
        loop: event loop of the desktop.
    """

    def __init__(self, handle: DesktopHandle, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = handle
        self._loop = loop

    def read_file(self, path: str) -> bytes:
        """Return a regular file (see `DesktopHandle`)."""
        return self._wait(self._handle.read_file(path))

    def execute(self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0) -> CommandResult:
        """Run a command to its end (see `DesktopHandle`)."""
        return self._wait(self._handle.execute(command, shell=shell, timeout_s=timeout_s))

    def screenshot(self) -> Image.Image:
        """Return the current screen (see `DesktopHandle`)."""
        return self._wait(self._handle.screenshot())

    def windows(self) -> list[dict[str, Any]]:
        """Return the windows on the screen (see `DesktopHandle`)."""
        return self._wait(self._handle.windows())

    def _wait(self, operation: Coroutine[Any, Any, _T]) -> _T:
        with contextlib.suppress(RuntimeError):  # raised in threads without an event loop
            if asyncio.get_running_loop() is self._loop:
                operation.close()
                raise TypeError("blocking_desktop would block the event loop: await episode.desktop instead")
        return asyncio.run_coroutine_threadsafe(operation, self._loop).result()
