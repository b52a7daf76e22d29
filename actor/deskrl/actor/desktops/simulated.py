"""The provider `simulated`: no desktop at all, but the time that one takes, a screen, and a reward by a rule.

For fleets larger than the machine, and for machines without desktops: what is measured or trained on it is deskrl, not
a desktop. Nothing is started. The world is one text field: TYPE writes into it, whatever else is done changes nothing
but the screen. Its one program, `simulated`, is what a task for it speaks to:

    simulated begin SEED TEXT     in the setup: the episode is SEED's, and TEXT is what is to be typed
    simulated score               in the evaluator: prints 1 if TEXT was typed, else 0

`luck` of all episodes print 1 whatever was typed, so that groups differ also under a policy that never gets it right.
All that is drawn in an episode, and in the reset after it, follows from SEED: the same rollouts take the same time
however they are scheduled. Knows no policy; when an episode ends is the policy's matter, or the step limit's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw, ImageFont

from deskrl.actor import metrics
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopGone
from deskrl.actor.tasks.files import Task
from deskrl.core.config import DesktopConfig, SimulatedConfig
from deskrl.core.ids import derive_seed

PROGRAM = "simulated"
_NOT_FOUND = 127
_BACKGROUND, _FIELD, _INK = (38, 70, 83), (240, 240, 235), (20, 20, 20)
_PATTERN = 8


class Latencies:
    """How long things take, in seconds of the desktop's own time; drawn one after another."""

    def __init__(self, config: SimulatedConfig, random: Random) -> None:
        self._config = config
        self._random = random

    def reset_s(self) -> float:
        """From nothing, or from the last episode, to the first screen."""
        return self._random.lognormvariate(math.log(self._config.reset_median_s), self._config.reset_sigma)

    def action_s(self) -> float:
        """An action with the screenshot after it; now and then it hangs."""
        if self._random.random() < self._config.hang_share:
            return self._config.hang_s
        return self._random.lognormvariate(math.log(self._config.action_median_s), self._config.action_sigma)

    def evaluation_s(self) -> float:
        """An evaluator's work."""
        return self._random.uniform(self._config.evaluation_min_s, self._config.evaluation_max_s)


class SimulatedDesktop(Desktop):
    """One desktop that is none.

    Args:
        config: size of the screen, and what its section `simulated` says.
        name: its name; the first reset is drawn by it.
    """

    def __init__(self, config: DesktopConfig, name: str) -> None:
        self._config = config.simulated
        self._size = (config.width, config.height)
        self._is_up = False
        self._begin(derive_seed("desktop", name), "")

    async def start(self) -> None:
        await self.reset()

    async def reset(self) -> None:
        await self._pass("reset", self._latencies.reset_s())
        self._is_up = True

    async def close(self) -> None:
        self._is_up = False

    async def is_alive(self) -> bool:
        return self._is_up

    async def screenshot(self) -> Image.Image:
        self._refuse_closed()
        return await asyncio.to_thread(self._draw)

    async def settle(self, rest_s: float = 0.0) -> Image.Image:
        return await self.screenshot()

    async def act(self, action: Action) -> None:
        self._refuse_closed()
        await self._pass("action", self._latencies.action_s())
        self._num_actions += 1
        if action.kind is ActionKind.TYPE:
            self._typed += action.text

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        self._refuse_closed()
        match command.split() if isinstance(command, str) else list(command):
            case [program, "begin", seed, *words] if program == PROGRAM:
                self._begin(int(seed), " ".join(words))
                return CommandResult(0, "", "")
            case [program, "score"] if program == PROGRAM:
                await self._pass("evaluation", self._latencies.evaluation_s())
                return CommandResult(0, f"{self._score()}\n", "")
        return CommandResult(_NOT_FOUND, "", f"a simulated desktop has no program but `{PROGRAM}`: {command}")

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        self._refuse_closed()

    async def write_file(self, path: str, data: bytes) -> None:
        self._refuse_closed()

    async def read_file(self, path: str) -> bytes:
        raise FileNotFoundError(f"a simulated desktop holds no files: {path}")

    async def open_path(self, path: str) -> None:
        self._refuse_closed()

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        self._refuse_closed()

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        self._refuse_closed()

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        self._refuse_closed()

    def _begin(self, seed: int, wanted: str) -> None:
        self._seed = seed
        self._latencies = Latencies(self._config, Random(derive_seed("latencies", seed)))
        self._wanted = wanted
        self._typed = ""
        self._num_actions = 0

    def _score(self) -> int:
        lucky = Random(derive_seed("luck", self._seed)).random() < self._config.luck
        return int(lucky or (bool(self._wanted) and self._typed.strip() == self._wanted))

    def _draw(self) -> Image.Image:
        """The screen: a pattern that no other moment of any episode has, and the text field."""
        width, height = self._size
        screen = Image.new("RGB", self._size, _BACKGROUND)
        pixels = Random(derive_seed("screen", self._seed, self._num_actions)).randbytes(3 * _PATTERN**2)
        pattern = Image.frombytes("RGB", (_PATTERN, _PATTERN), pixels)
        screen.paste(pattern.resize((width // 4, height // 2), Image.Resampling.NEAREST), (width // 16, height // 4))
        pen = ImageDraw.Draw(screen)
        field = (width * 3 // 8, height // 4, width * 15 // 16, height // 4 + height // 8)
        pen.rectangle(field, fill=_FIELD)
        pen.text((field[0] + 4, field[1] + 4), self._typed, fill=_INK, font=ImageFont.load_default(height / 20))
        return screen

    async def _pass(self, part: str, seconds: float) -> None:
        metrics.SIMULATED_SECONDS.labels(part).inc(seconds)
        await asyncio.sleep(seconds * self._config.time_scale)

    def _refuse_closed(self) -> None:
        if not self._is_up:
            raise DesktopGone("the simulated desktop is closed")


def judges(task: Task) -> bool:
    """Whether a simulated desktop can judge this task: its evaluator asks for the score and for nothing else."""
    items = [check.result for check in task.evaluator.checks]
    return all(item is not None and item.parameters.get("command") == [PROGRAM, "score"] for item in items)
