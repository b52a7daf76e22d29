"""One episode on one desktop, from the task's setup to a result; every step goes to replay as it happens.

Knows the order of things and whose doing an end is. Knows no lease, and not how a desktop is replaced.

A *result* is what the policy achieved; a *fault* is what the infrastructure spoilt. The rule:

- The desktop died, or did not come back in time, while an action was done or within `BLAME_S` after it: the policy's
  doing, a result with reward 0 and the termination DESKTOP_DESTROYED. So destroying the desktop is no way out of a
  bad reward, also where the destruction takes a moment (a fork bomb, a filling disk) or leaves a desktop that answers
  but can run nothing (`rm -rf /`).
- It died at any other time, or failed while it is alive: a fault.
- An action that cannot be parsed ends the episode with FORMAT_ERROR and reward 0. The end state is not evaluated,
  unless that is asked for: a reward that the desktop happens to hold would teach that format does not matter.
- A scripted solution that is not rewarded with 1.0 is a fault, never a demonstration.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from PIL import Image

from deskrl.actor import metrics
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.grammar import FormatError
from deskrl.actor.agent.players import Player, ScriptEnded
from deskrl.actor.agent.policy_client import InferenceFailed
from deskrl.actor.desktops.base import Desktop, DesktopError, DesktopGone
from deskrl.actor.metrics import DesktopState
from deskrl.actor.tasks.evaluators import evaluate_task
from deskrl.actor.tasks.files import Task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.core.config import DesktopConfig
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

EVALUATION_TURN = 2**32 - 1
"""The evaluation's place among the turns of a round, after all those of the policy."""
BLAME_S = 5.0
"""A desktop that dies within this time after an action has settled was destroyed by that action."""


class Fault(Exception):
    """The infrastructure ended the episode."""

    def __init__(self, kind: rollout_pb2.FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Destroyed(Exception):
    """The policy ended the desktop; the text says how."""


class Sink(Protocol):
    """Where an episode's screenshots and steps go as they happen. Adding never waits."""

    def add_image(self, image: common_pb2.Image) -> None:
        """Take a screenshot, the same one perhaps again."""

    def add_step(self, step: Step) -> None:
        """Take a step whose screenshots were added before."""


class Episode:
    """Plays one rollout.

    Args:
        desktop: freshly reset.
        task: what is played.
        rollout: with its seed and limits.
        conversation: fresh.
        player: who decides.
        sink: where steps and screenshots go. The result is returned, not sent.
        config: deadlines.
        enter: called with what the desktop is about to do.
        blame_s: see BLAME_S.
        evaluate_format_errors: ask the evaluator too where an action could not be parsed.
        await_turn: in lock-step, waits for the others before each turn of the policy and before the evaluation.
    """

    def __init__(
        self,
        desktop: Desktop,
        task: Task,
        rollout: rollout_pb2.Rollout,
        conversation: Conversation,
        player: Player,
        sink: Sink,
        config: DesktopConfig,
        enter: Callable[[DesktopState], None],
        blame_s: float = BLAME_S,
        evaluate_format_errors: bool = False,
        await_turn: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self._desktop = desktop
        self._task = task
        self._rollout = rollout
        self._conversation = conversation
        self._player = player
        self._sink = sink
        self._config = config
        self._enter = enter
        self._await_turn = await_turn
        self._blame_s = blame_s
        self._evaluate_format_errors = evaluate_format_errors
        self._scripted = rollout.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED
        self._acted_s: float | None = None
        self._image = common_pb2.Image()
        self._num_steps = 0

    async def play(self, reset_ms: float = 0.0) -> rollout_pb2.EpisodeResult:
        """Play to the end. After DESKTOP_DESTROYED, as after a fault, the desktop is not fit for use.

        Args:
            reset_ms: what the desktop's reset took, noted with the first step.

        Raises:
            Fault: the infrastructure ended it.
        """
        started_s = time.monotonic()
        try:
            termination, reward, evidence = await self._play({"reset": reset_ms})
        except _Destroyed as error:
            termination, reward = rollout_pb2.TERMINATION_DESKTOP_DESTROYED, 0.0
            evidence = json.dumps({"destroyed": str(error)})
        except InferenceFailed as error:
            raise Fault(rollout_pb2.FAULT_KIND_INFERENCE, str(error)) from error
        except ScriptEnded as error:
            raise Fault(rollout_pb2.FAULT_KIND_TASK_SETUP, str(error)) from error
        if self._scripted and reward != 1.0:
            reason = f"the scripted solution ended as {rollout_pb2.Termination.Name(termination)} with {reward}"
            raise Fault(rollout_pb2.FAULT_KIND_TASK_SETUP, f"{reason}: {evidence}")
        return rollout_pb2.EpisodeResult(
            reward=reward,
            format_ok=termination != rollout_pb2.TERMINATION_FORMAT_ERROR,
            termination=termination,
            num_steps=self._num_steps,
            evidence_json=evidence,
            final_image_hash=self._image.hash,
            duration_s=time.monotonic() - started_s,
        )

    async def _play(self, timings_ms: dict[str, float]) -> tuple[rollout_pb2.Termination, float, str]:
        """Termination, reward and evidence."""
        timings_ms["setup"] = await self._set_up()
        await self._observe(await self._first_screen())
        for index in range(self._rollout.max_steps):
            await self._wait_for_others(index)
            self._enter(DesktopState.WAITING_FOR_MODEL)
            decision = await self._player.decide(self._conversation, self._image, index)
            timings_ms |= decision.timings_ms
            try:
                action = self._conversation.parse(decision.step.text).action
            except FormatError as error:
                self._send(decision.step, timings_ms)
                reward, told = 0.0, {"format_error": str(error)}
                if self._evaluate_format_errors:
                    reward, evidence = await self._evaluate(None)
                    told["evaluation"] = json.loads(evidence)
                return rollout_pb2.TERMINATION_FORMAT_ERROR, reward, json.dumps(told)
            step = replace(decision.step, action=action.to_record())
            if action.ends_episode:
                self._send(step, timings_ms)
                gave_up = action.kind is ActionKind.INFEASIBLE
                reward, evidence = await self._evaluate(action)
                ended = rollout_pb2.TERMINATION_INFEASIBLE if gave_up else rollout_pb2.TERMINATION_FINISHED
                return ended, reward, evidence
            await self._refuse_corpse()
            try:
                screen = await self._act(action, timings_ms)
            finally:
                self._send(step, timings_ms)
            await self._observe(screen)
            timings_ms = {}
        reward, evidence = await self._evaluate(None)
        return rollout_pb2.TERMINATION_STEP_LIMIT, reward, evidence

    async def _set_up(self) -> float:
        """Bring the desktop to the task's first state; how long it took."""
        self._enter(DesktopState.SETTING_UP)
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._config.setup_timeout_s):
                await setup_task(self._desktop, self._task, self._rollout.seed)
        except Exception as error:  # a setup step may fail in any way, and is the infrastructure's all the same
            kind = rollout_pb2.FAULT_KIND_TASK_SETUP
            if not await self._is_alive():
                kind = rollout_pb2.FAULT_KIND_DESKTOP_LOST
            raise Fault(kind, f"setup: {describe(error)}") from error
        return 1000 * (time.monotonic() - started_s)

    async def _first_screen(self) -> Image.Image:
        try:
            async with asyncio.timeout(self._config.step_timeout_s):
                return await self._desktop.settle(self._player.rest_s)
        except TimeoutError as error:
            raise Fault(rollout_pb2.FAULT_KIND_DESKTOP_HUNG, "no first screenshot in time") from error
        except DesktopError as error:
            raise Fault(rollout_pb2.FAULT_KIND_DESKTOP_LOST, f"first screenshot: {describe(error)}") from error

    async def _observe(self, screen: Image.Image) -> None:
        """Show the screen to the policy, and send it to replay."""
        self._image = await asyncio.to_thread(self._conversation.observe, screen)
        self._sink.add_image(self._image)

    async def _act(self, action: Action, timings_ms: dict[str, float]) -> Image.Image:
        """Do an action and wait for the screen to settle. What ends the desktop here is the policy's doing."""
        self._enter(DesktopState.ACTING)
        limit_s = self._config.step_timeout_s + action.seconds
        async with self._blamed(f"after {action.kind}", limit_s):
            started_s = time.monotonic()
            self._acted_s = started_s
            await self._desktop.act(action)
            delivered_s = time.monotonic()
            timings_ms["input"] = 1000 * (delivered_s - started_s)
            screen = await self._desktop.settle(self._player.rest_s)
            self._acted_s = time.monotonic()
            timings_ms["settle"] = 1000 * (self._acted_s - delivered_s)
            metrics.STEP_SECONDS.observe(self._acted_s - started_s)
            return screen

    @contextlib.asynccontextmanager
    async def _blamed(self, place: str, limit_s: float) -> AsyncIterator[None]:
        """Turn a desktop's end in here into the policy's doing, and what fails on a living one into a fault."""
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError as error:
            raise _Destroyed(f"{place}: no settled screen within {limit_s:g} s") from error
        except DesktopGone as error:
            raise _Destroyed(f"{place}: {error}") from error
        except DesktopError as error:
            if not await self._is_alive():
                raise _Destroyed(f"{place}: {error}") from error
            raise Fault(rollout_pb2.FAULT_KIND_DESKTOP_LOST, f"{place}: {error}") from error

    async def _refuse_corpse(self) -> None:
        """Before an action: a desktop that is dead already was not ended by it."""
        if not await self._is_alive():
            self._raise_dead("while the model was waited for")

    async def _evaluate(self, final_action: Action | None) -> tuple[float, str]:
        await self._wait_for_others(EVALUATION_TURN)
        self._enter(DesktopState.EVALUATING)
        try:
            async with asyncio.timeout(self._config.evaluate_timeout_s):
                evaluation = await evaluate_task(self._desktop, self._task, final_action)
        except Exception as error:  # evaluators come with tasks: whatever they raise is no verdict
            if not await self._is_alive():
                self._raise_dead(f"during evaluation: {describe(error)}")
            if self._acted_s is not None and not await self._runs_commands():
                raise _Destroyed("the desktop cannot run a command any more") from error
            raise Fault(rollout_pb2.FAULT_KIND_EVALUATOR, describe(error)) from error
        return evaluation.reward, evaluation.evidence_json

    async def _wait_for_others(self, turn: int) -> None:
        if self._await_turn is not None:
            self._enter(DesktopState.WAITING_FOR_OTHERS)
            await self._await_turn(turn)

    def _raise_dead(self, place: str) -> None:
        """The desktop is found dead between actions: whose doing is it?"""
        if self._acted_s is not None and time.monotonic() - self._acted_s <= self._blame_s:
            raise _Destroyed(f"the desktop died {place}, right after an action")
        raise Fault(rollout_pb2.FAULT_KIND_DESKTOP_LOST, f"the desktop died {place}")

    async def _is_alive(self) -> bool:
        return await answers(self._desktop.is_alive(), self._config.step_timeout_s)

    async def _runs_commands(self) -> bool:
        """Whether there is anything left to evaluate: a desktop without its files may still answer."""
        try:
            async with asyncio.timeout(self._config.step_timeout_s):
                return (await self._desktop.execute(["true"])).returncode == 0
        except (DesktopError, TimeoutError):
            return False

    def _send(self, step: Step, timings_ms: dict[str, float]) -> None:
        rounded = {name: round(value, 1) for name, value in timings_ms.items()}
        self._sink.add_step(replace(step, timings_ms=rounded))
        self._num_steps += 1
        metrics.ENV_STEPS.inc()


async def answers(question: Awaitable[bool], limit_s: float) -> bool:
    """Whether a desktop says yes, and says so in time."""
    try:
        async with asyncio.timeout(limit_s):
            return await question
    except (DesktopError, TimeoutError):
        return False


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
