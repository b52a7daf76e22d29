"""Provider `openenv`: environments of an OpenEnv server whose observations contain an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from deskrl.actor.desktops.provider import DesktopDurations, DesktopProvider
from deskrl.actor.environments.environment_desktop import EnvironmentDesktop
from deskrl.actor.environments.environment_options import EnvironmentOptions
from deskrl.actor.environments.environment_tasks import find_unmet
from deskrl.actor.environments.openenv_environment import OpenEnvEnvironment
from deskrl.actor.task import Task
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE
from deskrl.core.config import DesktopConfig
from deskrl.core.config.value_types import HttpUrl
from deskrl.core.errors import UserError


class OpenEnvProvider(DesktopProvider):
    """Provider `openenv`."""

    class Options(EnvironmentOptions):
        """Options of an OpenEnv environment."""

        address: HttpUrl
        """Base URL of the server, such as http://127.0.0.1:8000. It needs a session for each desktop."""
        image_key: Annotated[str, Field(min_length=1)] = "screenshot"
        """Key of the observation that contains the image: a PNG or JPEG file in base64, or arrays of pixels."""
        image_shape_key: str = ""
        """Key of the observation that contains the shape of the image, if that is a flat array of pixels."""

    starts_within_seconds: ClassVar = True
    is_tried_before_run: ClassVar = True
    start_hint: ClassVar = "start the server, or correct desktop.provider_options; see docs/environments.md"
    task_suite: ClassVar[Path] = ENVIRONMENT_SUITE

    def make(self, config: DesktopConfig, options: Options, name: str, run_root: Path) -> EnvironmentDesktop:
        """Create a desktop without starting it."""
        environment = OpenEnvEnvironment(
            options.address, options.actions, options.image_key, options.image_shape_key, options.instruction_key
        )
        return EnvironmentDesktop(environment, config, options)

    def check_usable(self, config: DesktopConfig, options: Options) -> None:
        """Raise UserError if the policy's actions have no meaning in the environment."""
        if not options.actions:
            raise UserError(
                "desktop.provider_options.actions is empty, and an OpenEnv server does not say what its actions mean",
                'give an action for each gesture, such as actions = {click = {x = "{x}", y = "{y}"}}',
            )

    def find_unmet(self, task: Task) -> str | None:
        """Return why no environment can run a task."""
        return find_unmet(task)

    def durations(self, config: DesktopConfig, options: Options) -> DesktopDurations:
        """Return durations of a small environment on the same machine."""
        return DesktopDurations(reset_s=0.1, action_s=0.1, evaluation_s=0.001)
