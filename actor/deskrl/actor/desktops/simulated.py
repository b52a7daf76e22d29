"""Provider `simulated`: no real desktop, but its latencies, a synthetic screen and a rule-based reward.

For runs that are larger than the machine and for machines without desktops. No process is started. The state is one
text field: TYPE appends to it, and every other action changes only the screen. Tasks use one program, `simulated`:

    simulated begin SEED TEXT     setup step: seeds the episode, and TEXT is the text to be typed
    simulated score               evaluator: prints 1 if TEXT was typed, else 0

In a share `random_success_rate` of the episodes the score is 1 regardless of the text, so that groups have reward
variance even under a policy that never succeeds. All random values of an episode and of the following reset derive from
SEED: the same rollouts take the same time in any schedule.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont

from deskrl.actor import metrics
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopGone
from deskrl.actor.desktops.provider import DesktopDurations, DesktopProvider
from deskrl.actor.task import Task
from deskrl.actor.tasks.task_schema import SIMULATED_SUITE
from deskrl.core.config import DesktopConfig, SimulatedConfig
from deskrl.core.ids import derive_seed

PROGRAM = "simulated"
_NOT_FOUND = 127
_BACKGROUND_COLOUR, _FIELD_COLOUR, _TEXT_COLOUR = (38, 70, 83), (240, 240, 235), (20, 20, 20)
_PATTERN_SIZE = 8


class Latencies:
    """Sampler of the simulated latencies, in seconds before time scaling.

    Args:
        config: latency distributions.
        random: source of randomness; the latencies depend on the order of the calls.
    """

    def __init__(self, config: SimulatedConfig, random: Random) -> None:
        self._config = config
        self._random = random

    def reset_s(self) -> float:
        """Sample the duration of a start or reset."""
        return self._random.lognormvariate(math.log(self._config.reset_median_s), self._config.reset_sigma)

    def action_s(self) -> float:
        """Sample the duration of an action and the screenshot after it; at `hang_rate` it is `hang_s`."""
        if self._random.random() < self._config.hang_rate:
            return self._config.hang_s
        return self._random.lognormvariate(math.log(self._config.action_median_s), self._config.action_sigma)

    def evaluation_s(self) -> float:
        """Sample the duration of an evaluation."""
        return self._random.uniform(self._config.evaluation_min_s, self._config.evaluation_max_s)


class SimulatedDesktop(Desktop):
    """One simulated desktop.

    Args:
        config: desktop configuration; gives the screen size and, in its section `simulated`, latencies and reward.
        name: desktop name; seeds the latency of the first reset.
    """

    def __init__(self, config: DesktopConfig, name: str) -> None:
        self._config = config.simulated
        self._size = (config.width, config.height)
        self._is_running = False
        self._begin_episode(derive_seed("desktop", name), "")

    @property
    def can_observe_host(self) -> bool:
        """True: the desktop is a part of this process."""
        return True

    async def start(self) -> None:
        """Start the desktop after the simulated latency of a reset."""
        await self.reset()

    async def reset(self) -> None:
        """Wait for the simulated latency of a reset."""
        await self._simulate_delay("reset", self._latencies.reset_s())
        self._is_running = True

    async def close(self) -> None:
        """Mark the desktop as closed."""
        self._is_running = False

    async def is_alive(self) -> bool:
        """Return whether the desktop is started and not closed."""
        return self._is_running

    async def screenshot(self) -> Image.Image:
        """Return the synthetic screen."""
        self._check_running()
        return await asyncio.to_thread(self._render)

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        """Return the synthetic screen immediately, because it never changes by itself."""
        return await self.screenshot()

    async def act(self, action: Action) -> None:
        """Wait for the simulated latency and, for TYPE, append the text to the text field."""
        self._check_running()
        await self._simulate_delay("action", self._latencies.action_s())
        self._num_actions += 1
        if action.kind is ActionKind.TYPE:
            self._typed += action.text

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run the program `simulated`; the return code of every other command is 127."""
        self._check_running()
        match command.split() if isinstance(command, str) else list(command):
            case [program, "begin", seed, *words] if program == PROGRAM:
                self._begin_episode(int(seed), " ".join(words))
                return CommandResult(0, "", "")
            case [program, "score"] if program == PROGRAM:
                await self._simulate_delay("evaluation", self._latencies.evaluation_s())
                return CommandResult(0, f"{self._score()}\n", "")
        return CommandResult(_NOT_FOUND, "", f"a simulated desktop has only the program `{PROGRAM}`: {command}")

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Do nothing."""
        self._check_running()

    async def write_file(self, path: str, data: bytes) -> None:
        """Do nothing."""
        self._check_running()

    async def read_file(self, path: str) -> bytes:
        """Raise FileNotFoundError, because a simulated desktop has no files."""
        raise FileNotFoundError(f"a simulated desktop has no files: {path}")

    async def open_path(self, path: str) -> None:
        """Do nothing."""
        self._check_running()

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Do nothing."""
        self._check_running()

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Do nothing."""
        self._check_running()

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Do nothing."""
        self._check_running()

    def _begin_episode(self, seed: int, target_text: str) -> None:
        self._seed = seed
        self._latencies = Latencies(self._config, Random(derive_seed("latencies", seed)))
        self._target_text = target_text
        self._typed = ""
        self._num_actions = 0

    def _score(self) -> int:
        generator = Random(derive_seed("luck", self._seed))  # another label would change which episodes succeed
        succeeds = generator.random() < self._config.random_success_rate
        return int(succeeds or (bool(self._target_text) and self._typed.strip() == self._target_text))

    def _render(self) -> Image.Image:
        """Render the text field and a pattern that is unique to the episode and the number of actions."""
        width, height = self._size
        screen = Image.new("RGB", self._size, _BACKGROUND_COLOUR)
        pixels = Random(derive_seed("screen", self._seed, self._num_actions)).randbytes(3 * _PATTERN_SIZE**2)
        pattern = Image.frombytes("RGB", (_PATTERN_SIZE, _PATTERN_SIZE), pixels)
        screen.paste(pattern.resize((width // 4, height // 2), Image.Resampling.NEAREST), (width // 16, height // 4))
        pen = ImageDraw.Draw(screen)
        field = (width * 3 // 8, height // 4, width * 15 // 16, height // 4 + height // 8)
        pen.rectangle(field, fill=_FIELD_COLOUR)
        pen.text((field[0] + 4, field[1] + 4), self._typed, fill=_TEXT_COLOUR, font=ImageFont.load_default(height / 20))
        return screen

    async def _simulate_delay(self, part: str, seconds: float) -> None:
        metrics.SIMULATED_SECONDS.labels(part).inc(seconds)
        await asyncio.sleep(seconds * self._config.time_scale)

    def _check_running(self) -> None:
        if not self._is_running:
            raise DesktopGone("the simulated desktop is closed")


class SimulatedProvider(DesktopProvider):
    """Provider `simulated`."""

    task_suite: ClassVar = SIMULATED_SUITE

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> SimulatedDesktop:
        """Create a desktop without starting it."""
        return SimulatedDesktop(config, name)

    def find_unmet(self, task: Task) -> str | None:
        """Return why a simulated desktop cannot run a task: it uses more than the program `simulated`."""
        items = [check.result for check in task.evaluator.checks]
        if not all(item is not None and item.parameters.get("command") == [PROGRAM, "score"] for item in items):
            return "a simulated desktop cannot evaluate it"
        if any(step.parameters.get("command", [])[:1] != [PROGRAM] for step in task.config):
            return "a simulated desktop cannot set it up (tasks.noise needs real desktops)"
        return None

    def durations(self, config: DesktopConfig, options: Any) -> DesktopDurations:
        """Return the configured medians in real seconds."""
        times = config.simulated
        evaluation_s = (times.evaluation_min_s + times.evaluation_max_s) / 2
        scale = times.time_scale
        return DesktopDurations(times.reset_median_s * scale, times.action_median_s * scale, evaluation_s * scale)
