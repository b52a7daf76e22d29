"""Environments for tests: a game with one target, for Gymnasium (`target_game:Target-v0`) and behind OpenEnv.

The target is a white square in one of four quarters of a black image, as the seed decides. An action names a quarter:
hitting the target is rewarded with 1 and ends the episode, and missing it costs 0.25.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

WIDTH, HEIGHT = 64, 48
TARGET_ID = "target_game:Target-v0"
KEYS = {"press left": 0, "press right": 1, "press a": 2, "press b": 3}
"""Templates for the four quarters: top left, top right, bottom left, bottom right."""
KEY_OF_QUARTER = ("left", "right", "a", "b")


def quarter_of(seed: int) -> int:
    """Return the quarter of the target."""
    return Random(seed).randrange(4)


def picture(quarter: int) -> np.ndarray:
    """Return the image with the target."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top, left = HEIGHT // 2 * (quarter // 2), WIDTH // 2 * (quarter % 2)
    image[top : top + HEIGHT // 2, left : left + WIDTH // 2] = 255
    return image


class Target(gymnasium.Env[Any, Any]):
    """The game.

    Args:
        space: form of the action space: "number", "point", "cell", "text" or "table".
        fault: what the environment does instead of a step, if the file `fault_file` does not exist yet: "raise",
            "exit", "kill", "hang", "leak" or "nan". It creates the file, so that the next episode has no fault.
        fault_file: path of that file.
        observes: the observation is a table with image and mission instead of the image.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        render_mode: str | None = None,
        space: str = "number",
        fault: str = "",
        fault_file: str = "",
        observes: bool = False,
    ) -> None:
        self.render_mode = render_mode
        self.action_space = {
            "number": spaces.Discrete(4),
            "point": spaces.Box(-1.0, 1.0, (2,)),
            "cell": spaces.MultiDiscrete([2, 2]),
            "text": spaces.Text(1, charset="0123"),
            "table": spaces.Dict(button=spaces.Discrete(2), cell=spaces.MultiDiscrete([2, 2])),
        }[space]
        image = spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        text = spaces.Text(100, charset="abcdefghijklmnopqrstuvwxyz .H")
        self.observation_space = spaces.Dict(image=image, mission=text) if observes else image
        self._space, self._fault, self._fault_file, self._observes = space, fault, fault_file, observes
        self._quarter = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._quarter = quarter_of(seed or 0) if not options else int(options["quarter"])
        return self._observe(), {"hint": "Look for the white square."}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = self._disturb()
        hit = self._chosen(action) == self._quarter
        return self._observe(), (1.0 if hit else -0.25) + reward, hit, False, {}

    def render(self) -> Any:
        print("output of the environment")
        return picture(self._quarter)

    def _observe(self) -> Any:
        image = picture(self._quarter)
        return {"image": image, "mission": "Hit the white square."} if self._observes else image

    def _chosen(self, action: Any) -> int:
        match self._space:
            case "point":
                return int(action[0] > 0) + 2 * int(action[1] > 0)
            case "cell":
                return int(action[0]) + 2 * int(action[1])
            case "table":
                return int(action["cell"][0]) + 2 * int(action["cell"][1]) if action["button"] == 1 else -1
        return int(action)

    def _disturb(self) -> float:
        if not self._fault or os.path.exists(self._fault_file):
            return 0.0
        with open(self._fault_file, "w"):
            pass
        match self._fault:
            case "raise":
                raise ZeroDivisionError("the game is broken")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(1000)
            case "leak":
                self._leaked = np.ones(2**30, np.uint8)
        return float("nan")


class Blind(Target):
    """The game without images."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human"], "render_fps": 4}


gymnasium.register("Target-v0", Target)
gymnasium.register("Blind-v0", Blind)
gymnasium.register("TimedTarget-v0", Target, max_episode_steps=2)
