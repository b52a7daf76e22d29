"""GymnasiumDesktop: tasks on desktops as an environment of Gymnasium, registered as `deskrl/Desktop-v0`.

Observations are screenshots, and `info` has the instruction. The reward is that of a run and comes with the last step;
the limit on steps truncates the episode. A fault raises `DesktopFault`, because any number in its place would be a
reward.
"""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.guest.keysyms import NAMED_KEYS
from deskrl.core.errors import UserError
from deskrl.env.desktop_env import ConfigSource, DesktopEnv
from deskrl.env.episode_player import MAX_SEED, Turn

KINDS = tuple(ActionKind)
"""Kinds of actions; `kind` of an action is an index of it."""
MODIFIERS = ("ctrl", "shift", "alt", "super")
"""Keys that `modifiers` of an action presses, in the order of its bits."""
KEYS = ("", *string.ascii_lowercase, *string.digits, *(key for key in NAMED_KEYS if key not in MODIFIERS))
"""Keys; `key` of an action is an index of it, and 0 is none."""
MAX_NOTCHES = 10
"""Largest number of notches of the wheel in one action."""
_MAX_TEXT = 64
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"
_OPTIONS = ("task", "group")


def action_space(width: int, height: int) -> spaces.Dict:
    """Return the space of actions on screenshots of this size in pixels.

    Entries that the kind of an action does not use have no effect, and `step` accepts actions without them.
    """
    return spaces.Dict(
        {
            "kind": spaces.Discrete(len(KINDS)),
            "point": spaces.MultiDiscrete([width, height]),
            "end": spaces.MultiDiscrete([width, height]),
            "scroll": spaces.MultiDiscrete([2 * MAX_NOTCHES + 1] * 2, start=[-MAX_NOTCHES] * 2),
            "modifiers": spaces.MultiBinary(len(MODIFIERS)),
            "key": spaces.Discrete(len(KEYS)),
            "text": spaces.Text(_MAX_TEXT, min_length=0, charset=_CHARACTERS),
            "seconds": spaces.Box(0.0, 1.0, (), np.float32),
        }
    )


class GymnasiumDesktop(gymnasium.Env[Any, Any]):
    """One desktop with the tasks of a configuration.

    Args:
        config: run configuration, its values as nested tables, the path of a TOML file, or None for the defaults.
        render_mode: "rgb_array", or None.

    Raises:
        UserError: the configuration is invalid, or its desktops cannot run on this machine.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 # Gymnasium declares its type

    def __init__(self, config: ConfigSource = None, render_mode: str | None = None) -> None:
        self.desktop = DesktopEnv(config)
        self.render_mode = render_mode
        width, height = self.desktop.config.image_size
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = self._actions = action_space(width, height)
        self._screenshot = np.zeros((height, width, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seed of the episode; None: drawn from the generator of the last seed.
            options: `task`, the id of the task (the seed chooses one if there is none); `group`, a name: episodes of
                one group have the same noise and layout, as those of a training group have.

        Returns:
            The screenshot, uint8 of shape (height, width, 3), and `info`: `task`, `seed`, `instruction`, `num_steps`.

        Raises:
            ValueError: the task or an option is unknown, or the seed is invalid.
            DesktopFault: the desktop did not start, or the setup of the task failed repeatedly.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := [name for name in options if name not in _OPTIONS]:
            raise ValueError(f"reset has no option {unknown[0]!r} (hint: give {' or '.join(_OPTIONS)})")
        episode_seed = int(self.np_random.integers(MAX_SEED)) if seed is None else seed
        with _errors_of_one_argument():
            turn = self.desktop.reset(episode_seed, options.get("task"), options.get("group"))
        return self._observe(turn), _info(turn)

    def step(
        self, action: Mapping[str, Any] | Action | str
    ) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Execute an action.

        Args:
            action: action of the space, of which entries may be missing; or a `deskrl.actor.actions.Action`; or a
                response in the action language of the configuration.

        Returns:
            Screenshot, reward, terminated, truncated, and `info` as from `reset`; at the end it also has `termination`
            and `evidence`, JSON of what the reward was computed from.

        Raises:
            ValueError: the action is not in the space, or no episode is running; the episode continues.
            DesktopFault: the infrastructure ended the episode.
        """
        with _errors_of_one_argument():
            turn = self.desktop.step(self._parse(action) if isinstance(action, Mapping) else action)
        if turn.end is None:
            return self._observe(turn), 0.0, False, False, _info(turn)
        truncated = turn.end.is_truncated
        return self._observe(turn), turn.end.reward, not truncated, truncated, _info(turn)

    def render(self) -> NDArray[np.uint8] | None:
        """Return the last screenshot in the mode "rgb_array"."""
        return self._screenshot if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Remove the desktop."""
        self.desktop.close()

    def _observe(self, turn: Turn) -> NDArray[np.uint8]:
        self._screenshot = np.asarray(turn.screenshot)
        return self._screenshot

    def _parse(self, fields: Mapping[str, Any]) -> Action:
        space = self._actions
        if "kind" not in fields:
            raise UserError("the action has no kind", f"give the index of one of {', '.join(KINDS)}")
        for name, value in fields.items():
            if name not in space.spaces:
                raise UserError(f"an action has no {name!r}", f"give {', '.join(space.spaces)}")
            if not _is_in(space[name], value):
                valid = "a string" if name == "text" else f"a value of {space[name]}"
                raise UserError(f"{name} of the action is {value!r}", f"give {valid}")
        kind = KINDS[int(fields["kind"])]
        bits = fields.get("modifiers", ())
        held = [name for name, bit in zip(MODIFIERS, bits, strict=False) if bit]
        key = KEYS[int(fields.get("key", 0))]
        x, y = (int(value) for value in fields.get("point", (0, 0)))
        end_x, end_y = (int(value) for value in fields.get("end", (0, 0)))
        scroll_x, scroll_y = (int(value) for value in fields.get("scroll", (0, 0)))
        match kind:
            case ActionKind.HOTKEY:
                return Action(kind, keys=tuple(held + ([key] if key else [])) or ("shift",))
            case ActionKind.TYPE:
                return Action(kind, text=fields.get("text", ""))
            case ActionKind.WAIT:
                return Action(kind, seconds=float(fields.get("seconds", 0.0)))
            case ActionKind.DRAG:
                return Action(kind, x, y, end_x, end_y, keys=tuple(held))
            case ActionKind.SCROLL:
                return Action(kind, x, y, scroll_x=scroll_x, scroll_y=scroll_y, keys=tuple(held))
            case ActionKind.FINISHED | ActionKind.INFEASIBLE:
                return Action(kind)
        return Action(kind, x, y, keys=tuple(held))


@contextlib.contextmanager
def _errors_of_one_argument() -> Iterator[None]:
    """Raise a UserError as ValueError, because vector environments raise exceptions again with one argument."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


def _is_in(space: spaces.Space[Any], value: Any) -> bool:
    if isinstance(space, spaces.Text):  # its characters are for sampling; others can be typed too
        return isinstance(value, str)
    try:
        return space.contains(np.asarray(value, space.dtype) if isinstance(space, spaces.Box) else value)
    except (TypeError, ValueError):
        return False


def _info(turn: Turn) -> dict[str, Any]:
    info = {
        "task": turn.task_id,
        "seed": turn.seed,
        "instruction": turn.instruction,
        "num_steps": turn.num_steps,
    }
    if turn.end is not None:
        info |= {"termination": turn.end.termination, "evidence": json.dumps(turn.end.evidence)}
    return info
