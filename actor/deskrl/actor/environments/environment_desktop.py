"""Desktop that shows an environment with a reward of its own, and the interface of such environments."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopError, DesktopGone, EpisodeOutcome
from deskrl.actor.environments.environment_options import EnvironmentOptions
from deskrl.actor.environments.gestures import Gesture, make_gesture
from deskrl.actor.environments.screen_fit import ScreenFit
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError

_TIMEOUT_FRACTION = 0.95  # fail with a specific error shortly before the caller's deadline cancels the call

_T = TypeVar("_T")


@dataclass(frozen=True)
class Observation:
    """What an environment returns for a reset or a step."""

    image: Image.Image
    """RGB image of any size."""
    reward: float = 0.0
    end: str = ""
    """How the environment has ended the episode, such as "terminated"; empty if it has not."""
    instruction: str | None = None
    """Instruction of the episode; only of a reset."""


class Environment(ABC):
    """Connection to an environment that does not run in this process.

    Each call raises UserError if the configuration does not fit the environment, and DesktopError if it failed. After
    that, or after a call was cancelled, the only further call is `close`.
    """

    @abstractmethod
    async def open(self) -> None:
        """Start the environment, or connect to it."""

    @abstractmethod
    async def reset(self, seed: int, parameters: Mapping[str, Any]) -> Observation:
        """Start an episode; `parameters` are those of the task."""

    @abstractmethod
    async def step(self, gesture: Gesture) -> Observation | None:
        """Execute a gesture; return None if the environment has no action for it."""

    @abstractmethod
    async def close(self) -> None:
        """End the environment, or the connection. Idempotent; never raises."""

    @abstractmethod
    def end_cause(self) -> str | None:
        """Return why the environment is not open; None if it is open."""


class EnvironmentDesktop(Desktop):
    """One environment.

    Programs of the policy do not exist here, and its actions are checked before the environment gets them. Whatever
    breaks the environment is therefore a fault of the infrastructure, and `death_cause` always names it.

    Args:
        environment: environment that is not open yet.
        config: screen size and timeouts.
        options: actions, instruction and reward.
    """

    def __init__(self, environment: Environment, config: DesktopConfig, options: EnvironmentOptions) -> None:
        self._environment = environment
        self._config = config
        self._options = options
        self._screen_size = (config.width, config.height)
        self._failure: str | None = None
        self._is_closed = False
        self._forget_episode()

    @property
    def can_observe_host(self) -> bool:
        """True: see `death_cause`."""
        return True

    async def death_cause(self) -> str | None:
        """Return why the environment failed or is not open."""
        if self._is_closed:
            return "the actor closed the desktop"
        return self._failure or self._environment.end_cause()

    async def start(self) -> None:
        """Open the environment."""
        await self._call(self._environment.open, self._config.start_timeout_s, "start")

    async def reset(self) -> None:
        """End the episode; open the environment if it is not."""
        self._forget_episode()
        if self._failure is None and self._environment.end_cause() is not None:
            await self.start()

    async def close(self) -> None:
        """Close the environment."""
        self._is_closed = True
        await self._environment.close()

    async def is_alive(self) -> bool:
        """Return whether the environment is open and has not failed."""
        return not self._is_closed and self._failure is None and self._environment.end_cause() is None

    async def screenshot(self) -> Image.Image:
        """Return the environment's image on a screen; starts an episode with the seed 0 if none has begun."""
        self._require_alive()
        if self._screen is None:
            await self.begin_episode(0, {})
        assert self._screen is not None
        return self._screen

    async def act(self, action: Action) -> None:
        """Execute an action as one step of the environment, or several if it is repeated.

        An action that the environment does not have, or whose point is outside of its image, has no effect.
        """
        await self.screenshot()
        for _ in range(action.repeat if action.kind is ActionKind.HOTKEY else 1):
            if self._end:
                return
            gesture = make_gesture(self._fit.to_image(action), self._fit.image_size)
            observation = None if gesture is None else await self._step(gesture)
            if observation is None:
                self._num_ignored += 1
                return
            self._num_steps += 1
            await self._observe(observation)

    async def begin_episode(self, seed: int, parameters: Mapping[str, Any]) -> str | None:
        """Reset the environment (see the base class)."""
        self._forget_episode()

        async def reset() -> Observation:
            return await self._environment.reset(seed, parameters)

        observation = await self._call(reset, self._config.setup_timeout_s, "reset")
        await self._observe(observation)
        parts = [part for part in (self._options.instruction, observation.instruction) if part]
        return "\n".join(parts) or None

    async def has_episode_ended(self) -> bool:
        """Return whether the environment has ended the episode."""
        return bool(self._end)

    async def episode_outcome(self) -> EpisodeOutcome:
        """Return the reward of the episode (see `EnvironmentOptions.reward`)."""
        evidence = {"return": self._return, "end": self._end or None, "num_steps": self._num_steps}
        if self._num_ignored:
            evidence["num_ignored_actions"] = self._num_ignored
        return EpisodeOutcome(self._options.reward(self._return, bool(self._end)), evidence)

    def _forget_episode(self) -> None:
        self._screen: Image.Image | None = None
        self._return = 0.0
        self._end = ""
        self._num_steps = self._num_ignored = 0

    async def _step(self, gesture: Gesture) -> Observation | None:
        async def step() -> Observation | None:
            return await self._environment.step(gesture)

        return await self._call(step, self._config.step_timeout_s, "execute the action")

    async def _observe(self, observation: Observation) -> None:
        self._fit = ScreenFit(observation.image.size, self._screen_size)
        self._screen = await asyncio.to_thread(self._fit.show, observation.image)
        self._return += observation.reward
        self._end = observation.end

    async def _call(self, call: Callable[[], Awaitable[_T]], timeout_s: float, what: str) -> _T:
        """Return the result of a call of the environment; remember why it failed."""
        if what != "start":
            self._require_alive()
        limit_s = _TIMEOUT_FRACTION * timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await call()
        except TimeoutError as error:
            self._failure = f"the environment did not {what} within {limit_s:g} s"
            raise DesktopGone(self._failure) from error
        except asyncio.CancelledError:
            self._failure = f"the environment did not {what} in time"
            raise
        except UserError as error:
            self._failure = str(error)
            raise
        except DesktopError as error:
            self._failure = one_line(error)
            raise DesktopGone(self._failure) from error

    def _require_alive(self) -> None:
        cause = "the actor closed the desktop" if self._is_closed else self._failure or self._environment.end_cause()
        if cause is not None:
            raise DesktopGone(cause)
