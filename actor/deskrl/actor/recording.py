"""Recording of a demonstration: one episode that a person, and optionally a policy, plays on a live desktop.

The episode is that of a run: the same setup, execution of actions, limits and rewards. What the page of
`deskrl record` needs (state, live screen, input) are methods of `Recording`, for the event loop of the recording.
"""

from __future__ import annotations

import asyncio
import io
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec
from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.policies import ActorPolicy
from deskrl.actor.agent.shared_control import SharedControl, SharedConversation
from deskrl.actor.demonstrations import (
    Demonstration,
    DemonstrationStep,
    Player,
    write_demonstration,
    write_screenshot,
)
from deskrl.actor.desktop_starts import DesktopNotReadyError, reset_in_time
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.metrics import DesktopState, termination_label
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.task import Task
from deskrl.core.config import RunConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError
from deskrl.core.ids import episode_id, group_id
from deskrl.core.rpc import VERSION
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

QUEUE = "record"
"""Queue of the recording's rollout, which no replay service knows."""
_SCREEN_PERIOD_S = 0.15
_JPEG_QUALITY = 85
_STOPPED = "the recording was stopped before the end of the episode"
_INTERRUPTED = "the recording was interrupted"
"""Fault of a demonstration whose episode has not ended: that of its file if the process is killed."""

_log = logging.getLogger(__name__)


class Phase(StrEnum):
    """Phase of a recording."""

    STARTING = "starting"
    """The desktop starts."""
    SETTING_UP = "setting_up"
    PLAYING = "playing"
    EVALUATING = "evaluating"
    ENDED = "ended"


@dataclass(frozen=True)
class RecordingState:
    """What the page shows."""

    version: int
    """Number that grows with each change."""
    phase: Phase
    task_id: str
    instruction: str
    screen_size: tuple[int, int]
    player: Player
    """Who has control."""
    has_policy: bool
    is_acting: bool
    """Whether an action is being executed."""
    num_waiting: int
    """Number of the person's actions that wait for it."""
    message: str
    steps: tuple[DemonstrationStep, ...]
    max_steps: int
    screen: int
    """Number of the newest screen, which grows with each change of the screen; 0 before the first."""
    reward: float | None
    termination: str
    fault: str
    folder: str
    """Folder of the demonstration; empty once nothing of it is left, because it was discarded or has no step."""


class Recording:
    """One recording. It is also the sink of its episode.

    Args:
        config: run configuration; the sections `desktop`, `agent`, `reward` and `tasks` and the seed are used.
        task: task to play.
        desktop: desktop that has not been started.
        folder: folder of the demonstration, as `create_folder` makes it.
        open_policy: returns the policy that can play too; None: only the person plays.

    Raises:
        UserError: the reward or the action language is invalid.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        desktop: Desktop,
        folder: Path,
        open_policy: Callable[[rollout_pb2.Rollout], ActorPolicy] | None = None,
    ) -> None:
        self._config = config
        self._task = task
        self._desktop = desktop
        self._agent = Agent(config.agent)
        self._reward = make_reward(config)
        self._rollout = _rollout(task, config)
        policy = open_policy(self._rollout) if open_policy is not None else None
        self._control = SharedControl(desktop, policy, self._notify)
        self._conversation: SharedConversation | None = None
        self._screen = _LiveScreen()
        self._changed = asyncio.Event()
        self._started_s = 0.0
        self._started_unix_s = 0.0
        self._is_discarded = False
        self._running: asyncio.Task[rollout_pb2.EpisodeResult] | None = None
        self.size = (config.desktop.width, config.desktop.height)
        """Size of the screen in pixels."""
        self._folder = folder
        self._state = RecordingState(
            version=1,
            phase=Phase.STARTING,
            task_id=task.id,
            instruction=task.instruction,
            screen_size=self.size,
            player=Player.PERSON,
            has_policy=policy is not None,
            is_acting=False,
            num_waiting=0,
            message="",
            steps=(),
            max_steps=config.tasks.max_steps,
            screen=0,
            reward=None,
            termination="",
            fault="",
            folder=str(folder),
        )

    async def run(self) -> Demonstration | None:
        """Run the episode to its end and save the demonstration; return it, or None if it was discarded.

        If the recording is stopped, or a fault ends the episode, the demonstration is saved without a reward. One
        without steps is not saved.

        Raises:
            UserError: the desktop does not start, or the demonstration cannot be written.
        """
        try:
            demonstration = await self._record()
        except UserError as error:
            self._end(fault=error.message)
            raise
        if demonstration is None:
            self._end()
        else:
            self._end(demonstration.reward, demonstration.termination, demonstration.fault)
        return demonstration

    @property
    def state(self) -> RecordingState:
        """Present state."""
        return self._state

    async def wait_for_change(self, version: int, timeout_s: float) -> RecordingState:
        """Return the state once its version is greater than `version`, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._state.version <= version:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self._state

    def screen(self) -> bytes:
        """Return the newest screen as JPEG; empty before the first."""
        return self._screen.jpeg

    def act(self, action: Action) -> None:
        """Add an action of the person; ignored after the end of the episode."""
        if self._state.phase is Phase.PLAYING:
            self._control.act(action)

    def take_over(self) -> None:
        """Give control to the person."""
        self._control.take_over()

    def hand_over(self) -> None:
        """Give control to the policy, if there is one."""
        self._control.hand_over()

    def discard(self) -> None:
        """End the episode without a demonstration."""
        self._is_discarded = True
        self.stop()

    def stop(self) -> None:
        """End the episode without a reward; nothing happens once it has ended."""
        if self._running is not None:
            self._running.cancel()

    def add_image(self, image: common_pb2.Image) -> None:
        """Ignore a screenshot as the policy sees it; the demonstration has those of the whole screen."""

    def add_step(self, step: Step) -> None:
        """Save a step that was executed, so that it is not lost with the process.

        Raises:
            UserError: it cannot be written.
        """
        choice = self._control.choice
        assert choice is not None
        steps = self._state.steps
        name = write_screenshot(self._folder, len(steps), _encode(choice.screen, "PNG"))
        time_s = round(choice.chosen_s - self._started_s, 3)
        saved = DemonstrationStep(choice.action, choice.player, name, time_s, choice.thought)
        self._change(steps=(*steps, saved))
        write_demonstration(self._folder, self._demonstration(None, _INTERRUPTED))

    async def _record(self) -> Demonstration | None:
        self._started_unix_s = time.time()
        self._running = asyncio.create_task(self._play())
        streaming = asyncio.create_task(self._stream_screen())
        result, fault = None, ""
        try:
            result = await self._running
        except asyncio.CancelledError:
            fault = _STOPPED
        except Fault as error:
            fault = str(error)
        except UserError as error:
            if not self._state.steps:
                raise
            fault = error.message
        except Exception as error:  # a defect of deskrl; what was played is saved
            _log.exception("the episode failed")
            fault = typed_line(error)
        finally:
            self._change(phase=Phase.EVALUATING)
            await asyncio.wait({streaming})
        if self._is_discarded:
            return None
        demonstration = self._demonstration(result, fault)
        if demonstration.steps:
            write_demonstration(self._folder, demonstration)
        return demonstration

    def _end(self, reward: float | None = None, termination: str = "", fault: str = "") -> None:
        """Show how the recording ended, and remove the folder if there is nothing in it to keep."""
        is_kept = bool(self._state.steps) and not self._is_discarded
        if not is_kept:
            shutil.rmtree(self._folder, ignore_errors=True)
        folder = str(self._folder) if is_kept else ""
        self._change(phase=Phase.ENDED, reward=reward, termination=termination, fault=fault, folder=folder, message="")

    async def _play(self) -> rollout_pb2.EpisodeResult:
        await self._start_desktop()
        return await self._run_episode()

    async def _start_desktop(self) -> None:
        try:
            await reset_in_time(self._desktop, self._config.desktop.start_timeout_s)
        except DesktopNotReadyError as error:
            hint = select_provider(self._config.desktop).provider.start_hint
            raise UserError(f"the desktop did not start: {error}", hint) from error

    async def _run_episode(self) -> rollout_pb2.EpisodeResult:
        episode = Episode(
            self._desktop,
            self._task,
            self._rollout,
            self._start_conversation,
            self._control,
            self,
            self._config.desktop,
            enter=self._enter,
            reward=self._reward,
        )
        return await episode.run()

    def _start_conversation(self, instruction: str) -> Conversation:
        self._conversation = SharedConversation(self._agent.start_conversation(instruction))
        self._change(instruction=instruction)
        return self._conversation

    def _enter(self, state: DesktopState) -> None:
        phases = {DesktopState.SETTING_UP: Phase.SETTING_UP, DesktopState.EVALUATING: Phase.EVALUATING}
        phase = phases.get(state, Phase.PLAYING)
        if phase is Phase.PLAYING and not self._started_s:
            self._started_s = time.monotonic()
        self._change(phase=phase, is_acting=state is DesktopState.ACTING)

    async def _stream_screen(self) -> None:
        """Take screenshots for the page while an action is awaited. Problems of the desktop end the episode itself."""
        while self._state.phase not in (Phase.EVALUATING, Phase.ENDED):
            try:
                screen = await self._control.look()
            except DesktopError:
                return
            if screen is not None and await asyncio.to_thread(self._screen.update, screen):
                self._change(screen=self._screen.number)
            await asyncio.sleep(_SCREEN_PERIOD_S)

    def _demonstration(self, result: rollout_pb2.EpisodeResult | None, fault: str) -> Demonstration:
        """Return the demonstration; writes the screenshot of the end state, which is that of no step."""
        steps = self._state.steps
        final_screenshot = None
        if result is not None and not steps[-1].action.ends_episode:
            assert self._conversation is not None
            final_screenshot = write_screenshot(self._folder, len(steps), _encode(self._conversation.screen, "PNG"))
        return Demonstration(
            task_id=self._task.id,
            application=self._task.domain,
            instruction=self._state.instruction,
            task=msgspec.json.decode(self._task.data),
            seed=self._rollout.seed,
            screen_size=self.size,
            source="deskrl record",
            deskrl_version=VERSION,
            recorded_unix_s=self._started_unix_s,
            reward=None if result is None else result.reward,
            evidence=None if result is None else msgspec.json.decode(result.evidence_json),
            termination="" if result is None else termination_label(result.termination),
            fault=fault,
            steps=steps,
            final_screenshot=final_screenshot,
        )

    def _notify(self) -> None:
        self._change()

    def _change(self, **values: object) -> None:
        """Change the state, take over that of the control, and wake all that wait."""
        state = replace(
            self._state,
            version=self._state.version + 1,
            player=self._control.player,
            num_waiting=self._control.num_waiting,
            message=self._control.message,
        )
        self._state = replace(state, **values)  # type: ignore[arg-type]
        self._changed.set()
        self._changed = asyncio.Event()


class _LiveScreen:
    """Newest screen as JPEG, encoded when it has changed."""

    def __init__(self) -> None:
        self.number = 0
        self.jpeg = b""
        self._pixels = b""

    def update(self, screen: Image.Image) -> bool:
        """Set the newest screen; return whether it differs from the last one."""
        pixels = screen.tobytes()
        if pixels == self._pixels:
            return False
        self._pixels, self.jpeg = pixels, _encode(screen, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        self.number += 1
        return True


def _rollout(task: Task, config: RunConfig) -> rollout_pb2.Rollout:
    group = group_id(QUEUE, 0)
    return rollout_pb2.Rollout(
        episode_id=episode_id(group, 0),
        group_id=group,
        queue=QUEUE,
        task_id=task.id,
        seed=config.seed,
        max_steps=config.tasks.max_steps,
        temperature=config.learner.grpo.temperature,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )


def _encode(image: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
