"""Policies that act in an episode: the policy served by inference, and the scripted solution of a task."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from deskrl.actor import metrics
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.inference_client import InferenceClient, InferenceSession
from deskrl.actor.task import Task
from deskrl.core.ids import derive_seed
from deskrl.core.latency_breakdown import split_act_latency
from deskrl.core.step_codec import Step, VersionSpan
from deskrl.proto.v1 import common_pb2, rollout_pb2


class ScriptEndedError(RuntimeError):
    """A scripted solution has no further action although the episode has not ended; the task file is defective."""


@dataclass(frozen=True)
class Decision:
    """Response of a policy to one screenshot."""

    step: Step
    """Step as it is stored, except for the parsed action, which the episode adds."""
    timings_ms: dict[str, float]
    """Durations in milliseconds by part of the sampling latency."""
    screenshot: common_pb2.Image | None = None
    """Screenshot that the policy decided on, if it is newer than the one that it was given; it is the conversation's
    last observation."""


class ActorPolicy(ABC):
    """Policy that acts in one episode."""

    min_quiet_s: ClassVar[float] = 0.0
    """Minimum time in seconds without changes on the screen before this policy is shown a screenshot."""

    @abstractmethod
    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Respond to the last observation, and add the response to the conversation.

        Args:
            conversation: conversation of the episode; its last observation is `screenshot`.
            screenshot: newest screenshot.
            index: index of the step in the episode.
        """

    def add_screenshot(self, screenshot: common_pb2.Image) -> None:
        """Add a screenshot of the conversation to which another player responds."""
        return


class ServedPolicy(ActorPolicy):
    """Policy served by inference. Tokens and logprobs are stored exactly as inference reports them.

    Args:
        session: inference session of the episode.
        temperature: sampling temperature.
        seed: seed of the episode.
    """

    def __init__(self, session: InferenceSession, temperature: float, seed: int) -> None:
        self._session = session
        self._temperature = temperature
        self._seed = seed

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Sample an action (see the base class).

        Raises:
            InferenceError: no action was sampled before the deadline.
        """
        prompt = conversation.prompt()
        started_s = time.monotonic()
        sampled = await self._session.act(prompt.messages, screenshot, derive_seed(self._seed, index))
        act_s = time.monotonic() - started_s
        metrics.ACT_SECONDS.observe(act_s)
        conversation.respond(sampled.action_ids)
        step = Step(
            index=index,
            screenshot=screenshot.hash,
            images=prompt.images,
            text=sampled.text,
            prompt_ids=tuple(sampled.prompt_ids),
            action_ids=tuple(sampled.action_ids),
            logprobs=tuple(sampled.logprobs),
            spans=tuple(VersionSpan(s.version.lineage, s.version.step, s.start, s.end) for s in sampled.versions),
            processor_hash=sampled.processor_hash,
            temperature=self._temperature,
        )
        parts_ms = split_act_latency(
            1000 * act_s, sampled.image_ms, sampled.queue_ms, sampled.prefill_ms, sampled.decode_ms
        )
        metrics.TRANSPORT_SECONDS.observe(parts_ms["transport"] / 1000)
        return Decision(step, parts_ms)

    def add_screenshot(self, screenshot: common_pb2.Image) -> None:
        """Add a screenshot, which inference gets with the next request (see the base class)."""
        self._session.add_image(screenshot)


def open_served_policy(client: InferenceClient, rollout: rollout_pb2.Rollout) -> ActorPolicy:
    """Return the served policy for one rollout."""
    session = client.open_session(rollout.episode_id, rollout.temperature)
    return ServedPolicy(session, rollout.temperature, rollout.seed)


class ScriptedPolicy(ActorPolicy):
    """Scripted solution of a task, rendered as responses of the policy so that the learner can imitate it."""

    # A script does not look at the screen, and acts sooner after an action than a model does. Without this pause it
    # would click where a widget has not appeared yet.
    min_quiet_s = 0.3

    def __init__(self, task: Task) -> None:
        self._solution = task.demonstrate()

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Return the script's action (see the base class).

        Raises:
            ScriptEndedError: the script has no further action.
        """
        if index >= len(self._solution):
            raise ScriptEndedError(f"the scripted solution ends after {index} actions without ending the episode")
        thought, action = self._solution[index]
        text = conversation.render(PolicyResponse(thought, action))
        conversation.respond(text)
        prompt = conversation.prompt()
        step = Step(
            index=index,
            screenshot=screenshot.hash,
            images=prompt.images,
            text=text,
            messages=tuple(message.SerializeToString() for message in prompt.messages),
        )
        return Decision(step, {})
