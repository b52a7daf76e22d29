"""Base class of desktop providers: what creates the desktops of a run, and what other code needs to know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.task import Task
from deskrl.core.config import DesktopConfig
from deskrl.core.config.value_types import NonNegativeSeconds, Section


@dataclass(frozen=True)
class DesktopDurations:
    """Typical durations of a desktop's operations, in seconds."""

    reset_s: NonNegativeSeconds
    """Reset, including the task's setup."""
    action_s: NonNegativeSeconds
    """Action, including the screenshot after it."""
    evaluation_s: NonNegativeSeconds


class DesktopProvider(ABC):
    """Provider of desktops, selected by `desktop.provider`. A subclass needs only `make`.

    An object has no state: it is created without arguments wherever it is needed. `options` is an instance of the
    class's `Options` with the values of `desktop.provider_options`, and None for a provider without `Options`.
    """

    Options: ClassVar[type[Section] | None] = None
    """Schema of the provider's own configuration; None if it has none."""
    starts_within_seconds: ClassVar[bool] = False
    """Whether a desktop starts within seconds and without costs, so that `deskrl doctor` starts one."""
    is_tried_before_run: ClassVar[bool] = False
    """Whether `deskrl up` and `deskrl eval` start a desktop before the run, because only a start shows whether the
    configuration is correct."""
    start_hint: ClassVar[str] = "run the same command again; if it fails again, choose another desktop.provider"
    """Hint for a desktop that did not start."""
    uses_machine_resources: ClassVar[bool] = False
    """Whether the desktops take memory and open files of the actor's machine beyond those of the actor."""
    runs_machine_programs: ClassVar[bool] = False
    """Whether the desktops have the programs of the actor's machine, and no network, so that a task which needs a
    missing program or the network is rejected. False: they are assumed to have all programs, and network."""
    socket_name: ClassVar[str | None] = None
    """Name of the longest Unix socket in a desktop's folder `run_root / name`; None if there are none."""
    task_suite: ClassVar[Path | None] = None
    """Root of the provider's own task suite, which is used if `tasks.suite` is unset; None: deskrl's suite."""

    @abstractmethod
    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> Desktop:
        """Create a desktop without starting it.

        Args:
            config: section `desktop` of the run configuration.
            options: the provider's own configuration.
            name: unique name among the run's desktops.
            run_root: folder of all desktops of the run. It need not exist. Its path is short, because it may contain
                Unix sockets.
        """

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if a requirement of the provider is not met on this machine. Starts nothing."""
        return

    def reap(self, config: DesktopConfig, options: Any, run_root: Path) -> int:
        """Terminate and remove the run's desktops whose actor was killed; return their number.

        Other actors of the run may have desktops on the same machine, which must continue.
        """
        return 0

    def find_unmet(self, task: Task) -> str | None:
        """Return why no desktop of this provider can run a task, or None if that is not known."""
        return None

    def durations(self, config: DesktopConfig, options: Any) -> DesktopDurations:
        """Return the durations that `deskrl explain` assumes; by default those of a virtual machine."""
        return DesktopDurations(reset_s=45.0, action_s=3.0, evaluation_s=15.0)

    def describe_added_delays(self, config: DesktopConfig, options: Any) -> str:
        """Return a description of the delays that the configuration adds to all desktops; empty if it adds none."""
        return ""
