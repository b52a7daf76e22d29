"""Process of one Gymnasium environment: reads requests from standard input and writes replies to standard output.

    python -m deskrl.actor.environments.gymnasium_process

A request is one line of JSON: the first one describes the environment (`GymnasiumSettings`), the others are

    {"reset": {"seed": 1, "options": {...}}}    or    {"step": {"name": "click", "values": {...}, "image_size": [w, h]}}

A reply is one line of JSON, followed by the pixels of an RGB image if it has the key `size`:

    {"size": [w, h], "reward": 0.0, "end": "", "instruction": null}    the environment was reset, or made a step
    {"ignored": true}                                                  the environment has no action for the gesture
    {"opened": true}, {"error": "..."}, {"mistake": "...", "hint": "..."}

A mistake is one of the configuration. The process ends when its input is closed or the actor has ended.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from deskrl.actor.environments.gestures import Gesture
from deskrl.actor.environments.gymnasium_settings import OBSERVATION, RENDER, GymnasiumSettings
from deskrl.actor.environments.space_values import SpaceError, action_value, check_table, default_table
from deskrl.core.error_text import one_line, typed_line
from deskrl.core.process_lifecycle import die_with_parent

_GRACE_S = 1.0
_MISTAKES = (gymnasium.error.Error, ImportError, TypeError, SpaceError)
"""Errors of `gymnasium.make` that another attempt would raise too."""
_MAX_CHANNELS = 4

Pixels = npt.NDArray[np.uint8]


class MistakeError(Exception):
    """The configuration does not fit the environment.

    Args:
        message: what is wrong.
        hint: what the user can do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class EnvironmentRunner:
    """One environment.

    Raises:
        MistakeError: it does not exist, or the settings do not fit it.
    """

    def __init__(self, settings: GymnasiumSettings) -> None:
        self._settings = settings
        try:
            self._environment = _make(settings)
        except _MISTAKES as error:
            hint = "correct id and kwargs, and install the package of the environment; `module:id` imports a module"
            raise MistakeError(f"{settings.id} cannot be made: {typed_line(error)}", hint) from error
        _check_image_source(self._environment, settings)
        self._table = settings.actions or default_table(self._environment.action_space)
        try:
            check_table(self._environment.action_space, self._table)
        except SpaceError as error:
            hint = 'give an action for each gesture, such as actions = {"press left" = 0, click = ["{x}", "{y}"]}'
            raise MistakeError(f"{settings.id}: {one_line(error)}", hint) from error

    def reset(self, seed: int, options: Mapping[str, Any]) -> tuple[dict[str, Any], Pixels]:
        """Start an episode and return the reply with its image."""
        observation, info = self._environment.reset(seed=seed, options=dict(options) or None)
        reply = {"reward": 0.0, "end": "", "instruction": self._instruction(observation, info)}
        return reply, self._image(observation)

    def step(self, gesture: Gesture) -> tuple[dict[str, Any], Pixels | None]:
        """Execute a gesture and return the reply with its image."""
        template = self._table.get(gesture.name)
        action = None if template is None else action_value(self._environment.action_space, template, gesture)
        if action is None:
            return {"ignored": True}, None
        observation, reward, terminated, truncated, _ = self._environment.step(action)
        value = float(reward)
        if not math.isfinite(value):
            raise ValueError(f"the environment returned the reward {value}")
        end = "terminated" if terminated else "truncated" if truncated else ""
        return {"reward": value, "end": end, "instruction": None}, self._image(observation)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def _instruction(self, observation: Any, info: Mapping[str, Any]) -> str | None:
        key = self._settings.instruction_key
        if not key:
            return None
        for source in (observation, info):
            if isinstance(source, Mapping) and isinstance(source.get(key), str):
                return str(source[key])
        raise MistakeError(
            f"{self._settings.id}: neither observation nor info of a reset has a text {key!r}",
            "correct instruction_key, or leave it out",
        )

    def _image(self, observation: Any) -> Pixels:
        image = self._settings.image
        if image == RENDER:
            source = self._environment.render()
        else:
            source = observation if image == OBSERVATION else observation[image]
        try:
            return to_rgb(np.asarray(source))
        except ValueError as error:
            raise MistakeError(f"{self._settings.id}: {image}: {error}", "choose another image") from error


def to_rgb(array: npt.NDArray[Any]) -> Pixels:
    """Return an image as RGB of the shape (height, width, 3).

    Args:
        array: integers from 0 to 255 of the shape (height, width), (height, width, channels) or (channels, height,
            width), with 1, 3 or 4 channels.

    Raises:
        ValueError: it is anything else.
    """
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"not an image: {array.dtype} of the shape {array.shape}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] > _MAX_CHANNELS and array.shape[0] <= _MAX_CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4) or array.min() < 0 or array.max() > 255:
        raise ValueError(f"not an image: {array.dtype} of the shape {array.shape}")
    colours = array[:, :, :3] if array.shape[2] > 1 else array.repeat(3, axis=2)
    return np.ascontiguousarray(colours, np.uint8)


def main() -> None:
    """Serve requests until the input is closed."""
    die_with_parent(_GRACE_S)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the environment must not mix with replies
    settings = GymnasiumSettings.from_line(sys.stdin.buffer.readline())
    hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = settings.memory_bytes if hard_limit == resource.RLIM_INFINITY else min(settings.memory_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    runner: EnvironmentRunner | None = None
    try:
        runner = EnvironmentRunner(settings)
        _send(replies, {"opened": True})
        for line in sys.stdin.buffer:
            _send(replies, *_answer(runner, json.loads(line)))
    except MistakeError as error:
        _send(replies, {"mistake": one_line(error), "hint": error.hint})
    except gymnasium.error.DependencyNotInstalled as error:  # raised by the first image of some environments
        _send(replies, {"mistake": f"{settings.id}: {one_line(error)}", "hint": "install what the message names"})
    except Exception as error:  # the environment may raise anything; its state is unknown afterwards
        _send(replies, {"error": f"the environment raised {typed_line(error)}"})
    if runner is not None:
        runner.close()


def _answer(runner: EnvironmentRunner, request: dict[str, Any]) -> tuple[dict[str, Any], Pixels | None]:
    if "reset" in request:
        return runner.reset(**request["reset"])
    step = request["step"]
    return runner.step(Gesture(step["name"], step["values"], tuple(step["image_size"])))


def _send(replies: BinaryIO, reply: dict[str, Any], image: Pixels | None = None) -> None:
    if image is not None:
        reply |= {"size": [image.shape[1], image.shape[0]]}
    replies.write(json.dumps(reply).encode() + b"\n")
    if image is not None:
        replies.write(image.tobytes())
    replies.flush()


def _make(settings: GymnasiumSettings) -> gymnasium.Env[Any, Any]:
    sys.path.append(os.getcwd())  # modules of the user's own; last, so that no file there replaces an installed module
    if settings.image == RENDER:
        return gymnasium.make(settings.id, render_mode="rgb_array", **settings.kwargs)
    return gymnasium.make(settings.id, **settings.kwargs)


def _check_image_source(environment: gymnasium.Env[Any, Any], settings: GymnasiumSettings) -> None:
    """Raise MistakeError if the environment has no such image, as far as that is known before a reset."""
    image, space = settings.image, environment.observation_space
    if image == RENDER:
        if environment.render_mode != "rgb_array" or "rgb_array" not in environment.metadata.get("render_modes", ()):
            raise MistakeError(
                f"{settings.id} renders no images: it has no render mode rgb_array",
                "set image to observation, or to a key of the observation, if it is an image; choose another id if not",
            )
    elif image != OBSERVATION and (not isinstance(space, spaces.Dict) or image not in space.spaces):
        raise MistakeError(f"{settings.id}: the observation {space} has no key {image!r}", "correct image")


if __name__ == "__main__":
    main()
