"""The interface that every desktop provider meets. Knows no provider, no task and no policy.

Operations raise DesktopError (the infrastructure's fault) or complete; callers put a deadline around each. A desktop
whose call was cancelled or raised is not used again: it is closed and replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from deskrl.actor.actions import Action

Address = Path | tuple[str, int]
"""Where a guest server listens: a Unix socket, or host and port."""


class DesktopError(RuntimeError):
    """The desktop failed by itself: it did not start, died, or answered nonsense."""


class DesktopGone(DesktopError):
    """The desktop does not exist any more (its processes died or its limits killed it)."""


@dataclass(frozen=True)
class CommandResult:
    """A command that ran to its end inside the desktop."""

    returncode: int
    stdout: str
    stderr: str


class Desktop(ABC):
    """One desktop: a screen, a keyboard and pointer, and a home folder in which tasks are set up and judged."""

    @property
    def address(self) -> Address:
        """Where its guest server speaks OSWorld's protocol; raises DesktopGone if there is none."""
        raise DesktopGone("this desktop has no guest server")

    @abstractmethod
    async def start(self) -> None:
        """Bring it up: returns when a screenshot can be taken."""

    @abstractmethod
    async def reset(self) -> None:
        """Back to the first state: a fresh home folder, no application of the last task. Starts it if it is not up."""

    @abstractmethod
    async def close(self) -> None:
        """End it and everything of it: processes, mounts, sockets, folders. Never raises; safe to call twice."""

    async def idle(self) -> None:
        """Nothing will be asked of it for a while: it may sleep until the next call."""
        return

    @abstractmethod
    async def is_alive(self) -> bool:
        """Whether it still exists and answers. Cheap."""

    @abstractmethod
    async def screenshot(self) -> Image.Image:
        """What is on the screen now, RGB at full size."""

    @abstractmethod
    async def settle(self, rest_s: float = 0.0) -> Image.Image:
        """Wait until the screen is quiet (or the limit for that has passed), then what is on it.

        Args:
            rest_s: how long it must have been quiet where that is longer than `settle_quiet_s`.
        """

    @abstractmethod
    async def act(self, action: Action) -> None:
        """Do one action; returns when the input has been delivered (use `settle` to see what came of it)."""

    @abstractmethod
    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command in the desktop's session to its end, as its user.

        A program that cannot be started is 127 (there is none) or 126 (no right, no room for a process), as in a shell.
        """

    @abstractmethod
    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application without waiting for it."""

    @abstractmethod
    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file inside the desktop (`~` is its user's home), making parent folders."""

    @abstractmethod
    async def read_file(self, path: str) -> bytes:
        """Read a file inside the desktop; raises FileNotFoundError if there is none that can be read."""

    @abstractmethod
    async def open_path(self, path: str) -> None:
        """Open a file with its default application and wait for its window."""

    @abstractmethod
    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a mapped window whose title or class contains `name`; raises DesktopError if none comes."""

    @abstractmethod
    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Bring a window to the front by its title (or class), OSWorld's semantics."""

    @abstractmethod
    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window by its title (or class), OSWorld's semantics."""
