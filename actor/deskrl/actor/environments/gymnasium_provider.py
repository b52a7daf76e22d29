"""Provider `gymnasium`: environments of Gymnasium with an image, each in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from deskrl.actor.desktops.provider import DesktopDurations, DesktopProvider
from deskrl.actor.environments.environment_desktop import EnvironmentDesktop
from deskrl.actor.environments.environment_options import EnvironmentOptions
from deskrl.actor.environments.environment_tasks import find_unmet
from deskrl.actor.environments.gymnasium_environment import GymnasiumEnvironment
from deskrl.actor.environments.gymnasium_settings import GymnasiumSettings
from deskrl.actor.task import Task
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import missing_package


class GymnasiumProvider(DesktopProvider):
    """Provider `gymnasium`."""

    class Options(EnvironmentOptions):
        """Options of a Gymnasium environment."""

        id: Annotated[str, Field(min_length=1)]
        """Id of the environment for `gymnasium.make`; `package.module:id` imports a module that registers it."""
        kwargs: dict[str, Any] = Field(default_factory=dict)
        """Further arguments of `gymnasium.make`."""
        image: Annotated[str, Field(min_length=1)] = "render"
        """Image that the screen shows. `render`: the environment's rendering in the mode `rgb_array`; `observation`:
        the observation; or the key of an observation that is a table."""

    starts_within_seconds: ClassVar = True
    is_tried_before_run: ClassVar = True
    start_hint: ClassVar = "correct desktop.provider_options; see docs/environments.md"
    uses_machine_resources: ClassVar = True
    task_suite: ClassVar[Path] = ENVIRONMENT_SUITE

    def make(self, config: DesktopConfig, options: Options, name: str, run_root: Path) -> EnvironmentDesktop:
        """Create a desktop without starting it."""
        settings = GymnasiumSettings(
            options.id, options.kwargs, options.image, options.actions, options.instruction_key, config.memory_bytes
        )
        return EnvironmentDesktop(GymnasiumEnvironment(settings), config, options)

    def check_usable(self, config: DesktopConfig, options: Options) -> None:
        """Raise UserError if the package gymnasium is not installed."""
        if importlib.util.find_spec("gymnasium") is None:
            raise missing_package("gymnasium", "gymnasium")

    def find_unmet(self, task: Task) -> str | None:
        """Return why no environment can run a task."""
        return find_unmet(task)

    def durations(self, config: DesktopConfig, options: Options) -> DesktopDurations:
        """Return durations of a small environment on a processor."""
        return DesktopDurations(reset_s=0.05, action_s=0.05, evaluation_s=0.001)
