"""EpisodePlayer: one desktop whose episodes are played by the caller, with the course of an actor's episodes.

Setup, noise, actions, evaluation and the attribution of problems are those of `actor/episode.py`; only the policy is
the caller. After a fault, `start` runs the episode again as the replay service does, at most `replay.max_faults` times.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.actor import metrics
from deskrl.actor.actions import Action
from deskrl.actor.agent.action_language import InitialPrompt
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.prompts import initial_prompt
from deskrl.actor.desktop_starts import DesktopNotReadyError, reset_in_time
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop, reap_desktops
from deskrl.actor.episode import Episode
from deskrl.actor.extensions import check_extensions
from deskrl.actor.main import desktops_dir
from deskrl.actor.materialize_tasks import load
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.task import Task
from deskrl.actor.tasks.noise import add_rollout_noise
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.actor.worker import End, is_desktop_reusable, run_to_end
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed, new_id
from deskrl.core.step_codec import Step
from deskrl.env.caller_policy import CallerConversation, CallerPolicy, check_action
from deskrl.env.desktop_fault import DesktopFault
from deskrl.proto.v1 import common_pb2, rollout_pb2

MAX_SEED = 2**63 - 1
"""Largest seed of an episode."""
_TRAINING_QUEUE = "train"
_NUM_SHOWN_TASKS = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeEnd:
    """Result of an episode: what the policy achieved."""

    reward: float
    """Reward in [0, 1]."""
    termination: str
    """Reason of the end as in the metrics of actors: `finished`, `step_limit`, `format_error`, ..."""
    evidence: dict[str, Any]
    """What the reward was computed from, as JSON values."""

    @property
    def is_truncated(self) -> bool:
        """Whether the limit on the number of steps ended the episode; the end state was evaluated all the same."""
        return self.termination == "step_limit"


@dataclass(frozen=True)
class Turn:
    """What the policy gets after a reset and after each action."""

    task_id: str
    seed: int
    instruction: str
    """Instruction of the episode."""
    png: bytes
    """Screenshot as the policy of a run sees it (`agent.image_width`, `agent.image_height`), encoded as PNG."""
    num_steps: int
    """Number of actions so far."""
    end: EpisodeEnd | None = None
    """Result, if the episode has ended."""

    @property
    def screenshot(self) -> Image.Image:
        """Screenshot as an RGB image."""
        return Image.open(io.BytesIO(self.png)).convert("RGB")


class EpisodePlayer:
    """One desktop, started by the first episode. Its methods are called by one coroutine at a time.

    Args:
        config: run configuration; the sections `desktop`, `tasks`, `agent` and `reward` and the seed are used.

    Raises:
        UserError: the configuration is invalid, requirements of tasks are not met, or this machine lacks a requirement
            of the provider.
    """

    def __init__(self, config: RunConfig) -> None:
        check_extensions(config)
        check_usable(config.desktop)
        tasks, left_out = load(config)
        if left_out:
            total = len(tasks) + len(left_out)
            _log.warning("%d of %d tasks are left out: their requirements are not met", len(left_out), total)
        self.config = config
        self.tasks: dict[str, Task] = {task.id: task for task in tasks}
        """Tasks by id, in the order of the configuration."""
        self._agent = Agent(config.agent)
        self._reward = make_reward(config)
        self._desktop: Desktop | None = None
        self._running: asyncio.Task[End] | None = None
        self._policy = CallerPolicy(config.image_size)
        self._rollout = rollout_pb2.Rollout()
        self._instruction = ""
        self._image = common_pb2.Image()
        self._num_steps = 0

    async def start(self, seed: int, task_id: str | None = None, group: str | None = None) -> Turn:
        """Reset the desktop, set up a task and return the first screenshot. A running episode is abandoned.

        Args:
            seed: seed of the episode, from 0 to MAX_SEED.
            task_id: task to play; None: the seed chooses one.
            group: episodes of one group have the same noise and the same layout of pages, as the rollouts of a training
                group have; None: the seed names the group.

        Raises:
            UserError: the task or the seed is invalid.
            DesktopFault: the desktop did not start or the setup failed, also when it was repeated.
        """
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"the seed {seed} is invalid", f"give a seed from 0 to {MAX_SEED}")
        task = self._choose(seed, task_id)
        num_faults = 0
        while True:
            try:
                return await self._begin(task, seed, f"seed-{seed}" if group is None else group)
            except DesktopFault as fault:
                num_faults += 1
                if num_faults > self.config.replay.max_faults:
                    raise
                _log.warning("task %s is set up again after a fault: %s", task.id, fault)

    async def act(self, answer: Action | str) -> Turn:
        """Execute an action, and evaluate the end state if it ends the episode.

        Args:
            answer: action whose points are pixels of the screenshot; or a response in the action language of the run,
                whose errors are the policy's: it ends the episode with the termination `format_error`.

        Raises:
            UserError: no episode is running, or the action cannot be executed; the episode continues.
            DesktopFault: the infrastructure ended the episode.
        """
        if self._running is None:
            raise UserError("no episode is running", "call reset first")
        if isinstance(answer, Action):
            check_action(answer, self.config.image_size)
        self._policy.answer(answer)
        return await self._next_turn(self._running)

    def initial_prompt(self) -> InitialPrompt:
        """Return the prompt of the run's action language with the instruction of the episode."""
        return initial_prompt(select_language(self.config.agent), self.config.agent, self._instruction)

    async def close(self) -> None:
        """Abandon a running episode and remove the desktop. The next `start` creates another one."""
        await self._abandon()
        await self._discard()

    def add_image(self, image: common_pb2.Image) -> None:
        """Receive a screenshot of the running episode."""
        self._image = image

    def add_step(self, step: Step) -> None:
        """Receive a step of the running episode."""
        self._num_steps += 1

    def _choose(self, seed: int, task_id: str | None) -> Task:
        names = list(self.tasks)
        if task_id is None:
            return self.tasks[names[derive_seed("task", seed) % len(names)]]
        if task_id not in self.tasks:
            shown = ", ".join(names[:_NUM_SHOWN_TASKS]) + (", …" if len(names) > _NUM_SHOWN_TASKS else "")
            raise UserError(f"there is no task {task_id!r}", f"choose one of {len(names)}: {shown}")
        return self.tasks[task_id]

    async def _begin(self, task: Task, seed: int, group: str) -> Turn:
        await self._abandon()
        started_s = time.monotonic()
        desktop = await self._fresh_desktop()
        reset_ms = 1000 * (time.monotonic() - started_s)
        rollout = self._rollout = rollout_pb2.Rollout(
            episode_id=new_id("episode"),
            group_id=group,
            queue=_TRAINING_QUEUE,
            task_json=task.data,
            task_id=task.id,
            seed=seed,
            max_steps=self.config.tasks.max_steps,
            acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        )
        policy = self._policy = CallerPolicy(self.config.image_size)
        self._num_steps = 0

        def make_episode() -> Episode:
            return Episode(
                desktop,
                add_rollout_noise(parse_task(rollout.task_json, f"task {task.id}"), rollout, self.config),
                rollout,
                self._start_conversation,
                policy,
                self,
                self.config.desktop,
                enter=lambda state: None,
                evaluate_format_errors=self.config.agent.format_error == "evaluate",
                reward=self._reward,
            )

        self._running = asyncio.create_task(run_to_end(make_episode, rollout.episode_id, reset_ms))
        return await self._next_turn(self._running)

    def _start_conversation(self, instruction: str) -> CallerConversation:
        self._instruction = instruction
        return CallerConversation(self._agent.start_conversation(instruction))

    async def _next_turn(self, running: asyncio.Task[End]) -> Turn:
        """Wait until the episode asks for an action or ends."""
        asked = asyncio.create_task(self._policy.is_asked.wait())
        try:
            await asyncio.wait({asked, running}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the caller would take the next screenshot for the answer to its next action
            await self._abandon()
            raise
        finally:
            asked.cancel()
        if not running.done():
            return self._turn(None)
        self._running = None
        end = running.result()
        if not is_desktop_reusable(end):
            await self._discard()
        if isinstance(end, rollout_pb2.EpisodeFault):
            raise DesktopFault.of_kind(metrics.fault_label(end.kind), end.message)
        evidence = json.loads(end.evidence_json or "{}")
        return self._turn(EpisodeEnd(end.reward, metrics.termination_label(end.termination), evidence))

    def _turn(self, end: EpisodeEnd | None) -> Turn:
        rollout = self._rollout
        return Turn(rollout.task_id, rollout.seed, self._instruction, self._image.data, self._num_steps, end)

    async def _fresh_desktop(self) -> Desktop:
        """Reset the desktop, or start one; raises DesktopFault."""
        limits = self.config.desktop
        if self._desktop is None:
            root = desktops_dir(self.config)
            await asyncio.to_thread(reap_desktops, limits, root)
            self._desktop = make_desktop(limits, new_id("desktop"), root)
        try:
            await reset_in_time(self._desktop, limits.start_timeout_s)
        except asyncio.CancelledError:
            await self._discard()
            raise
        except DesktopNotReadyError as error:
            await self._discard()
            kind = metrics.fault_label(rollout_pb2.FAULT_KIND_DESKTOP_START)
            raise DesktopFault.of_kind(kind, f"the desktop did not start: {error}") from error
        return self._desktop

    async def _abandon(self) -> None:
        """Cancel a running episode. While it waits for an action, its desktop can be used again."""
        if self._running is None:
            return
        is_idle = self._policy.is_asked.is_set() and not self._running.done()
        self._running.cancel()
        await asyncio.wait({self._running})
        self._running = None
        if not is_idle:
            await self._discard()

    async def _discard(self) -> None:
        if self._desktop is not None:
            desktop, self._desktop = self._desktop, None
            await desktop.close()
