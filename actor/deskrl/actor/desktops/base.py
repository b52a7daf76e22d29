"""Desktop interface that every provider implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deskrl.actor.actions import Action

Address = Path | tuple[str, int]
"""Address of a guest server: the path of a Unix socket, or host and port."""


class DesktopError(RuntimeError):
    """Infrastructure fault of a desktop: it did not start, died, or returned an invalid answer."""


class DesktopGone(DesktopError):
    """The desktop no longer exists: its processes died or were killed by its resource limits."""


class UnsupportedOperation(DesktopError):
    """The desktop has no such operation: a task that needs it cannot run on this provider's desktops."""


@dataclass(frozen=True)
class CommandResult:
    """Result of a command that ran to its end inside the desktop."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class EpisodeOutcome:
    """What an environment with a reward of its own gives for an episode."""

    reward: float
    """Reward in [0, 1]."""
    evidence: dict[str, Any]
    """What the reward was computed from, as JSON values."""


class Desktop(ABC):
    """One desktop: screen, keyboard, pointer, and a home folder in which tasks are set up and evaluated.

    Operations complete or raise DesktopError within time limits of their own, whatever the guest does; callers may put
    shorter deadlines around them. After an operation was cancelled or raised, the desktop must be closed and replaced.

    Abstract are the operations that every desktop needs. Commands, files, windows, the controlled browser and episodes
    of an environment are optional: a task that needs one that the desktop does not have ends with a fault
    (UnsupportedOperation).
    `deskrl.testing.desktops` checks an implementation.
    """

    @property
    def address(self) -> Address:
        """Address of the guest server, which implements OSWorld's protocol; raises DesktopGone if there is none."""
        raise DesktopGone("this desktop has no guest server")

    @property
    def can_observe_host(self) -> bool:
        """Whether the host can tell who ended this desktop, so that `death_cause` returning None means the policy.

        False: the desktop runs where the host cannot look (another machine, a virtual machine).
        """
        return False

    async def death_cause(self) -> str | None:
        """Return evidence on the host's side that the infrastructure, not the policy, ended the desktop.

        Examples: the host's out-of-memory killer outside the desktop's own limits, a signal from outside the sandbox,
        `close` of this object, a docker daemon that has ended. Never raises.

        Returns:
            One line that names the cause; None if there is no such evidence, or if the desktop runs.
        """
        return None

    async def start(self) -> None:
        """Start the desktop and return when a screenshot can be taken. By default the same as a reset."""
        await self.reset()

    @abstractmethod
    async def reset(self) -> None:
        """Restore the initial state: fresh home folder, no open applications. Starts the desktop if necessary."""

    @abstractmethod
    async def close(self) -> None:
        """Terminate the desktop and remove its processes, mounts, sockets and folders. Idempotent; never raises."""

    async def idle(self) -> None:
        """Announce that no operation follows for a while. The desktop may be suspended until the next operation."""
        return

    @abstractmethod
    async def is_alive(self) -> bool:
        """Return whether the desktop exists and responds. Cheap."""

    async def allow_terminal(self) -> None:
        """Let Ctrl+Alt+T open a terminal, as on OSWorld's desktop; for setups of tasks that need one.

        Without this call no key and no menu of the window manager starts a program. Does nothing on guests that deskrl
        cannot change.
        """
        return

    async def end_setup(self) -> None:
        """Announce that the setup is complete and the policy acts next.

        The desktop remembers which processes exist: they belong to the setup. From now on, `execute` runs commands in a
        clean environment: fixed PATH with read-only folders only, isolated Python, no configuration from the home.
        Does nothing on guests that deskrl cannot change.
        """
        return

    async def stop_policy_programs(self) -> None:
        """Kill every process that the policy started, so that post-configuration can use the setup's applications.

        Kept are the setup's processes and those of their descendants that run the same executable as the setup's
        process, unless it is a shell or an interpreter. Shells and interpreters of the setup that have a terminal are
        suspended (SIGSTOP), because the policy may have typed programs into them. Windows of killed programs are
        removed. Does nothing on guests that deskrl cannot change.

        Raises:
            DesktopError: `end_setup` was not called, or processes remained.
        """
        return

    async def stop_all_programs(self) -> None:
        """Kill all processes of the desktop's session, including the setup's and the window manager. Idempotent.

        From now on each command of `execute` runs in a fresh sandbox over the same files, without network, windows and
        other processes. `read_file` and `screenshot` continue to work, `launch`, `act` and window operations do not.
        Does nothing on guests that deskrl cannot change.

        Raises:
            DesktopError: processes remained.
        """
        return

    async def redraw(self) -> None:
        """Make every window repaint itself and wait until the screen has settled.

        A following screenshot shows only what living programs draw: pixels that a program left on the screen are gone.
        Does nothing on guests that deskrl cannot change.
        """
        return

    async def windows(self) -> list[dict[str, Any]]:
        """Return the windows on the screen, oldest first, or an empty list if the provider cannot list them.

        Each record has `id`, `title`, `window_class`, `x`, `y`, `width`, `height`, `is_splash` (whether the application
        declares the window as a splash screen), `stack_position` (a window covers those with lower positions; None if
        it is minimised), and two facts that no program on the desktop can write about itself:

            is_setup_program    whether the window belongs to a process that `stop_policy_programs` keeps
            executable          path of that process's program; empty if it is unknown
        """
        return []

    @abstractmethod
    async def screenshot(self) -> Image.Image:
        """Return the current screen as an RGB image at full size."""

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        """Wait until the screen has stopped changing or the settle timeout has passed, and return a screenshot.

        By default it does not wait, for desktops whose screen only changes during an action.

        Args:
            min_quiet_s: minimum time in seconds without changes, if longer than `desktop.settle_quiet_s`.
        """
        return await self.screenshot()

    @abstractmethod
    async def act(self, action: Action) -> None:
        """Execute one action and return when the input was delivered. Use `settle` to see its effect."""

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end in the desktop's session, as the desktop's user.

        After `end_setup` the environment is clean, and after `stop_all_programs` nothing else runs beside the command.
        The return code of a program that cannot be started is 127 (not found) or 126 (not permitted, or the process
        limit is reached), as in a shell.
        """
        raise UnsupportedOperation("this desktop has no commands")

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application without waiting for it."""
        raise UnsupportedOperation("this desktop has no applications")

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file inside the desktop and create its parent folders. `~` is the home of the desktop's user."""
        raise UnsupportedOperation("this desktop has no files")

    async def read_file(self, path: str) -> bytes:
        """Return a regular file of the desktop.

        Raises:
            FileNotFoundError: it does not exist, is not readable, is not a regular file, or is larger than
                `desktop.max_file_bytes`.
        """
        raise UnsupportedOperation("this desktop has no files")

    async def open_path(self, path: str) -> None:
        """Open a file in its default application and wait for the window."""
        raise UnsupportedOperation("this desktop has no files")

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a mapped window whose title or class contains `name`; raises DesktopError after `timeout_s`."""
        raise UnsupportedOperation("this desktop has no windows")

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Raise and focus a window found by its title (or class), with OSWorld's semantics."""
        raise UnsupportedOperation("this desktop has no windows")

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window found by its title (or class), with OSWorld's semantics."""
        raise UnsupportedOperation("this desktop has no windows")

    async def start_browser(self, command: Sequence[str], events: Sequence[str]) -> None:
        """Start a browser that the guest server controls by a DevTools connection out of reach of all other programs.

        At most one per reset. Its pages other than the first one are closed as soon as they are opened.

        Args:
            command: command line, with `--remote-debugging-pipe`.
            events: methods of the DevTools events that `browser_events` returns.
        """
        raise UnsupportedOperation("this desktop has no controlled browser")

    async def call_browser(
        self, method: str, parameters: Mapping[str, Any], session_id: str | None = None
    ) -> dict[str, Any]:
        """Call a DevTools method and return its result; raises DesktopError if the browser rejects it or has exited.

        Args:
            method: method, such as `Runtime.evaluate`.
            parameters: its parameters.
            session_id: session of `Target.attachToTarget`; None: the browser itself.
        """
        raise UnsupportedOperation("this desktop has no controlled browser")

    async def browser_events(self) -> list[dict[str, Any]]:
        """Return the first requested events, oldest first; also after the browser has ended."""
        raise UnsupportedOperation("this desktop has no controlled browser")

    async def begin_episode(self, seed: int, parameters: Mapping[str, Any]) -> str | None:
        """Start an episode of the environment that this desktop shows, which rewards and ends episodes by itself.

        Args:
            seed: seed of the environment's random numbers, from 0 to 2**31 - 1.
            parameters: what the task passes to the environment.

        Returns:
            The instruction of the episode; None if the environment gives none.
        """
        raise UnsupportedOperation("this desktop has no episodes of its own")

    async def has_episode_ended(self) -> bool:
        """Return whether the environment has ended the episode, so that further actions have no effect."""
        return False

    async def episode_outcome(self) -> EpisodeOutcome:
        """Return the environment's reward of the episode so far."""
        raise UnsupportedOperation("this desktop has no episodes of its own")
