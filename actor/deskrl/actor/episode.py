"""Episode: runs one rollout on one desktop, from the setup of the task to a result or a fault.

A *result* is what the policy achieved; a *fault* is a failure of the infrastructure. `end_causes` decides which of them
a problem is. Beyond that:

- An action that cannot be parsed: a result with reward 0 and the termination FORMAT_ERROR. By default the end state is
  not evaluated, because rewarding it would teach the policy that the format does not matter.
- A scripted solution did not solve its task, for any reason: a fault, so that it never becomes a demonstration. Solved
  means the value 1.0 of the task's own evaluator (`EpisodeReward.is_demonstration`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from PIL import Image

from deskrl.actor import metrics
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.policies import ActorPolicy, Decision, ScriptEndedError
from deskrl.actor.desktops.base import Desktop, DesktopError, DesktopGone
from deskrl.actor.end_causes import EndCause, InfrastructureFault, Phase, Problem, attribute_end, machine_error
from deskrl.actor.metrics import DesktopState
from deskrl.actor.rewards.episode_reward import EpisodeReward
from deskrl.actor.rewards.reward_interface import EpisodeAction, ended_episode
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError, has_task_ended
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import one_line, typed_line
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

EVALUATION_STEP = 2**32 - 1
"""Step index of the evaluation in the lock-step schedule, after all steps of the policy."""
_TRAINING_QUEUE = "train"
"""Queue whose groups are compared by the learner: their members have one `group_seed` (see `setup_task`)."""
_DEATH_CAUSE_S = 1.0
"""Time in seconds for which the host looks for the cause of a lost desktop, whose processes may still be ending."""
_DEATH_CAUSE_POLL_S = 0.05
_MAX_REASON_CHARACTERS = 500
_EVIDENCE_KEYS = {
    rollout_pb2.TERMINATION_DESKTOP_DESTROYED: "destroyed",
    rollout_pb2.TERMINATION_STATE_UNREADABLE: "unreadable",
}

_log = logging.getLogger(__name__)


class Fault(Exception):
    """The infrastructure ended the episode.

    Args:
        kind: kind of fault.
        message: cause.
    """

    def __init__(self, kind: rollout_pb2.FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _PolicyFailedError(Exception):
    """A problem ended the episode with the policy's failure; the message describes the problem."""

    def __init__(self, termination: rollout_pb2.Termination, message: str) -> None:
        super().__init__(message)
        self.termination = termination


class EpisodeSink(Protocol):
    """Receiver of an episode's screenshots and steps. Its methods do not wait."""

    def add_image(self, image: common_pb2.Image) -> None:
        """Add a screenshot; the same one may be added again."""

    def add_step(self, step: Step) -> None:
        """Add a step whose screenshots were added before."""


class Episode:
    """Runs one rollout.

    Args:
        desktop: desktop that has just been reset.
        task: task of the rollout.
        rollout: seed and limits.
        start_conversation: returns a new conversation about an instruction; called after the setup, which may give one.
        policy: policy that acts.
        sink: receiver of steps and screenshots. The result is returned and not sent to it.
        config: timeouts.
        enter: called with each new state of the desktop.
        evaluate_format_errors: evaluate the end state also after an action that cannot be parsed.
        await_step: in the lock-step schedule, waits for the other episodes before each step and before the evaluation.
        reward: reward of the end state.
    """

    def __init__(
        self,
        desktop: Desktop,
        task: Task,
        rollout: rollout_pb2.Rollout,
        start_conversation: Callable[[str], Conversation],
        policy: ActorPolicy,
        sink: EpisodeSink,
        config: DesktopConfig,
        enter: Callable[[DesktopState], None],
        evaluate_format_errors: bool = False,
        await_step: Callable[[int], Awaitable[None]] | None = None,
        *,
        reward: EpisodeReward,
    ) -> None:
        self._desktop = desktop
        self._task = task
        self._rollout = rollout
        self._conversation: Conversation
        self._start_conversation = start_conversation
        self._policy = policy
        self._sink = sink
        self._config = config
        self._enter = enter
        self._await_step = await_step
        self._evaluate_format_errors = evaluate_format_errors
        self._reward = reward
        self._actions: list[EpisodeAction] = []
        self._png_files: list[bytes] = []
        self._scripted = rollout.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED
        self._has_acted = False
        self._image = common_pb2.Image()
        self._num_steps = 0

    async def run(self, reset_ms: float = 0.0) -> rollout_pb2.EpisodeResult:
        """Run the episode to its end. After a failure by `end_causes`, or a fault, the desktop must not be used again.

        Args:
            reset_ms: duration of the desktop's reset in milliseconds, stored with the first step.

        Raises:
            Fault: the infrastructure ended the episode.
        """
        started_s = time.monotonic()
        try:
            termination, reward, evidence = await self._run_steps({"reset": reset_ms})
        except _PolicyFailedError as error:
            termination, reward = error.termination, 0.0
            evidence = json.dumps({_EVIDENCE_KEYS[termination]: str(error)})
        except ScriptEndedError as error:
            raise Fault(rollout_pb2.FAULT_KIND_TASK_SETUP, str(error)) from error
        if self._scripted and not self._reward.is_demonstration(reward, evidence):
            name = metrics.termination_label(termination)
            message = f"the scripted solution got the reward {reward:g} (termination {name}): {evidence}"
            raise Fault(rollout_pb2.FAULT_KIND_TASK_SETUP, message)
        return rollout_pb2.EpisodeResult(
            reward=reward,
            format_ok=termination != rollout_pb2.TERMINATION_FORMAT_ERROR,
            termination=termination,
            num_steps=self._num_steps,
            evidence_json=evidence,
            final_image_hash=self._image.hash,
            duration_s=time.monotonic() - started_s,
        )

    async def _run_steps(self, timings_ms: dict[str, float]) -> tuple[rollout_pb2.Termination, float, str]:
        """Set up the task, run all steps and evaluate; return termination, reward and evidence."""
        timings_ms["setup"] = await self._set_up()
        await self._observe(await self._first_screenshot())
        for index in range(self._rollout.max_steps):
            await self._wait_for_others(index)
            self._enter(DesktopState.WAITING_FOR_MODEL)
            decision = await self._decide(index)
            timings_ms |= decision.timings_ms
            if decision.screenshot is not None:
                self._replace_screenshot(decision.screenshot)
            try:
                response = self._conversation.parse(decision.step.text)
            except FormatError as error:
                self._send(decision.step, timings_ms)
                return await self._end_with_format_error(error)
            action = response.action
            self._actions.append(EpisodeAction(response.thought, action))
            step = replace(decision.step, action=action.to_record())
            if action.ends_episode:
                self._send(step, timings_ms)
                infeasible = action.kind is ActionKind.INFEASIBLE
                reward, evidence = await self._evaluate(action)
                ended = rollout_pb2.TERMINATION_INFEASIBLE if infeasible else rollout_pb2.TERMINATION_FINISHED
                return ended, reward, evidence
            await self._require_alive()
            try:
                screenshot = await self._act(action, timings_ms)
            finally:
                self._send(step, timings_ms)
            await self._observe(screenshot)
            timings_ms = {}
            if await self._has_task_ended():
                reward, evidence = await self._evaluate(None)
                return rollout_pb2.TERMINATION_FINISHED, reward, evidence
        reward, evidence = await self._evaluate(None)
        return rollout_pb2.TERMINATION_STEP_LIMIT, reward, evidence

    async def _decide(self, index: int) -> Decision:
        """Let the policy decide on its next action."""
        try:
            return await self._policy.decide(self._conversation, self._image, index)
        except (InferenceError, DesktopError) as error:
            raise await self._end(Phase.SAMPLING, one_line(error), error) from error

    async def _end_with_format_error(self, error: FormatError) -> tuple[rollout_pb2.Termination, float, str]:
        reward, evidence = 0.0, {"format_error": str(error)}
        if self._evaluate_format_errors:
            try:
                reward, evaluation = await self._evaluate(None)
                evidence["evaluation"] = json.loads(evaluation)
            except _PolicyFailedError as failure:
                evidence["evaluation"] = str(failure)
        return rollout_pb2.TERMINATION_FORMAT_ERROR, reward, json.dumps(evidence)

    async def _set_up(self) -> float:
        """Run the setup steps of the task and return the duration in milliseconds."""
        self._enter(DesktopState.SETTING_UP)
        started_s = time.monotonic()
        async with self._attribute_problems(Phase.SETUP, "setup", self._config.setup_timeout_s):
            rollout = self._rollout
            group_seed = derive_seed(rollout.group_id) if rollout.queue == _TRAINING_QUEUE else rollout.seed
            instruction = await setup_task(self._desktop, self._task, rollout.seed, self._config, group_seed)
            self._task = replace(self._task, instruction=instruction)
            self._conversation = self._start_conversation(instruction)
            if not self._desktop.can_observe_host:
                # A guest of the user's own may lack what input needs. After the policy's first action, this would
                # count as its failure.
                await self._desktop.act(Action(ActionKind.WAIT))
        return 1000 * (time.monotonic() - started_s)

    async def _first_screenshot(self) -> Image.Image:
        async with self._attribute_problems(Phase.FIRST_SCREENSHOT, "first screenshot", self._config.step_timeout_s):
            screenshot = await self._desktop.settle(self._policy.min_quiet_s)
        return screenshot

    async def _observe(self, screenshot: Image.Image) -> None:
        """Add a screenshot to the conversation and to the sink."""
        self._image = await asyncio.to_thread(self._conversation.observe, screenshot)
        self._sink.add_image(self._image)
        if self._reward.reads_screenshots(self._task):
            self._png_files.append(self._image.data)

    def _replace_screenshot(self, image: common_pb2.Image) -> None:
        """Replace the last screenshot by a newer one that the policy decided on."""
        self._image = image
        self._sink.add_image(image)
        if self._png_files:
            self._png_files[-1] = image.data

    async def _act(self, action: Action, timings_ms: dict[str, float]) -> Image.Image:
        """Perform an action and wait until the screen has settled."""
        self._enter(DesktopState.ACTING)
        timeout_s = self._config.step_timeout_s + action.seconds
        async with self._attribute_problems(Phase.ACTING, f"after {action.kind}", timeout_s):
            started_s = time.monotonic()
            self._has_acted = True
            await self._desktop.act(action)
            delivered_s = time.monotonic()
            timings_ms["input"] = 1000 * (delivered_s - started_s)
            screenshot = await self._desktop.settle(self._policy.min_quiet_s)
            settled_s = time.monotonic()
            timings_ms["settle"] = 1000 * (settled_s - delivered_s)
            metrics.STEP_SECONDS.observe(settled_s - started_s)
        return screenshot

    async def _has_task_ended(self) -> bool:
        """Return whether the task has ended by itself, as pages of MiniWoB++ do."""
        async with self._attribute_problems(Phase.ACTING, "looking for the end", self._config.step_timeout_s):
            return await has_task_ended(self._desktop, self._task)

    async def _require_alive(self) -> None:
        """Raise if the desktop was lost while the policy was sampling."""
        async with self._attribute_problems(Phase.SAMPLING, "while the policy was sampling", None):
            if not await self._is_alive():
                raise DesktopGone("the desktop does not respond")

    async def _evaluate(self, final_action: Action | None) -> tuple[float, str]:
        await self._wait_for_others(EVALUATION_STEP)
        self._enter(DesktopState.EVALUATING)
        ended = ended_episode(
            self._desktop, self._task, self._actions, self._png_files, final_action, self._rollout.seed
        )
        async with self._attribute_problems(Phase.EVALUATING, "evaluation", self._reward.timeout_s):
            evaluation = await self._reward.evaluate(self._desktop, ended)
        return evaluation.reward, evaluation.evidence_json

    @contextlib.asynccontextmanager
    async def _attribute_problems(self, phase: Phase, where: str, timeout_s: float | None) -> AsyncIterator[None]:
        """Limit the time of a context, and turn each exception in it into a fault or into the policy's failure."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except Exception as error:  # evaluators are part of tasks and may raise anything; none of it is a reward
            is_timeout = isinstance(error, TimeoutError) and timeout_s is not None
            reason = f"not done within {timeout_s:g} s" if is_timeout else typed_line(error)
            raise await self._end(phase, f"{where}: {reason}", error) from error

    async def _end(self, phase: Phase, message: str, error: Exception) -> Exception:
        """Return the exception that ends the episode after a problem."""
        problem = await self._problem(error)
        evidence = await self._host_evidence(problem, error) if self._has_acted else None
        if problem is Problem.UNEXPECTED_ERROR and phase is not Phase.SETUP:
            _log.error("%s: %s", self._rollout.episode_id, message, exc_info=error)
        end = attribute_end(
            EndCause(phase, problem, self._has_acted, self._desktop.can_observe_host, evidence is not None)
        )
        if isinstance(end, InfrastructureFault):
            return Fault(end.kind, message if evidence is None else f"{evidence}; {message}")
        return _PolicyFailedError(end.termination, message[:_MAX_REASON_CHARACTERS])

    async def _problem(self, error: Exception) -> Problem:
        """Return what kind of problem an exception is; asks the desktop whether it still responds if that decides."""
        if isinstance(error, InferenceError):
            return Problem.MODEL_UNREACHABLE
        if isinstance(error, EvaluatorError | UserError):
            return Problem.EVALUATOR_ERROR
        if isinstance(error, DesktopGone) or not await self._is_alive():
            return Problem.DESKTOP_LOST
        if isinstance(error, TimeoutError):
            return Problem.TIMEOUT
        if isinstance(error, DesktopError):
            return Problem.OPERATION_FAILED
        if isinstance(error, UnreadableStateError):
            return Problem.STATE_UNREADABLE
        return Problem.UNEXPECTED_ERROR

    async def _host_evidence(self, problem: Problem, error: Exception) -> str | None:
        """Return evidence on the host's side of a cause outside the desktop; None if there is none."""
        if (lack := machine_error(error)) is not None:
            return f"this machine lacks resources: {lack}"
        deadline_s = time.monotonic() + _DEATH_CAUSE_S
        while True:
            cause = await self._desktop.death_cause()
            is_decided = problem is not Problem.DESKTOP_LOST or not self._desktop.can_observe_host
            if cause is not None or is_decided or time.monotonic() > deadline_s:
                return cause
            await asyncio.sleep(_DEATH_CAUSE_POLL_S)

    async def _wait_for_others(self, step: int) -> None:
        """In the lock-step schedule, wait until all running episodes have reached a step."""
        if self._await_step is not None:
            self._enter(DesktopState.WAITING_FOR_OTHERS)
            await self._await_step(step)

    async def _is_alive(self) -> bool:
        return await is_true_within(self._desktop.is_alive(), self._config.step_timeout_s)

    def _send(self, step: Step, timings_ms: dict[str, float]) -> None:
        """Add a step with its durations, rounded to 0.1 ms, to the sink."""
        rounded = {name: round(value, 1) for name, value in timings_ms.items()}
        self._sink.add_step(replace(step, timings_ms=rounded))
        self._num_steps += 1
        metrics.ENV_STEPS.inc()


async def is_true_within(check: Awaitable[bool], timeout_s: float) -> bool:
    """Return whether a check of a desktop returns true within a timeout; an error of the desktop counts as false."""
    try:
        async with asyncio.timeout(timeout_s):
            return await check
    except (DesktopError, TimeoutError):
        return False
