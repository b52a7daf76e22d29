"""Who decides in an episode: the served policy, or the task's scripted solution. Knows no desktop and no reward."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from deskrl.actor import metrics
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.grammar import Turn
from deskrl.actor.agent.policy_client import PolicyClient, PolicySession
from deskrl.actor.tasks.files import Task
from deskrl.core.ids import derive_seed
from deskrl.core.timings import split_act
from deskrl.core.trajectory import Span, Step
from deskrl.proto.v1 import common_pb2, rollout_pb2


class ScriptEnded(RuntimeError):
    """A scripted solution has no further action, though the episode goes on: the task file's fault."""


@dataclass(frozen=True)
class Decision:
    """One turn as it will be stored, still without what was done with it."""

    step: Step
    timings_ms: dict[str, float]


class Player(ABC):
    """Decides on one action after another of one episode."""

    rest_s: ClassVar[float] = 0.0
    """How long a screen must rest, at the least, before it is shown to this player."""

    @abstractmethod
    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """The answer to the conversation's last observation, which is `screenshot`; recorded in the conversation."""


class SampledPlayer(Player):
    """The served policy. What it saw and sampled is stored exactly as inference reports it."""

    def __init__(self, session: PolicySession, temperature: float, seed: int) -> None:
        self._session = session
        self._temperature = temperature
        self._seed = seed

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Sample an action.

        Raises:
            InferenceFailed: no action within the deadline.
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
            spans=tuple(Span(s.version.lineage, s.version.step, s.start, s.end) for s in sampled.versions),
            processor_hash=sampled.processor_hash,
            temperature=self._temperature,
        )
        parts_ms = split_act(1000 * act_s, sampled.image_ms, sampled.queue_ms, sampled.prefill_ms, sampled.decode_ms)
        metrics.TRANSPORT_SECONDS.observe(parts_ms["transport"] / 1000)
        return Decision(step, parts_ms)


def sampled_player(policy: PolicyClient, rollout: rollout_pb2.Rollout) -> Player:
    """The served policy, as it plays one episode."""
    session = policy.open_session(rollout.episode_id, rollout.temperature)
    return SampledPlayer(session, rollout.temperature, rollout.seed)


class ScriptedPlayer(Player):
    """The task's solution, said in the policy's words, so that it can be imitated."""

    rest_s = 0.3  # a policy looks and thinks longer than that; a script clicks where something will be, there or not

    def __init__(self, task: Task) -> None:
        self._solution = task.demonstrate()

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Say the next action of the script.

        Raises:
            ScriptEnded: there is none.
        """
        if index >= len(self._solution):
            raise ScriptEnded(f"the scripted solution ends after {index} actions without finishing")
        thought, action = self._solution[index]
        text = conversation.render(Turn(thought, action))
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
