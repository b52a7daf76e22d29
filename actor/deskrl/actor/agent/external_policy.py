"""A policy behind an OpenAI-compatible server: conversations go out, answers come back as text.

Such a server tells neither token ids nor logprobs nor which weights acted, and `Step` holds none of them then: its
episodes can be judged, and never learnt from. Knows that protocol; knows no desktop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from deskrl.actor import metrics
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.players import Decision, Player
from deskrl.actor.agent.policy_client import InferenceFailed
from deskrl.actor.retries import Pauses
from deskrl.core.config import InferenceConfig
from deskrl.core.evaluation.external import request
from deskrl.core.ids import derive_seed
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import common_pb2, inference_pb2, rollout_pb2

_ROLES = {
    inference_pb2.MESSAGE_ROLE_SYSTEM: "system",
    inference_pb2.MESSAGE_ROLE_USER: "user",
    inference_pb2.MESSAGE_ROLE_ASSISTANT: "assistant",
}


class _Unavailable(Exception):
    """The server cannot answer now, and may later."""


class ExternalPolicy:
    """The server that a configuration names.

    Args:
        config: its address, the model, and how long an answer may be.
        timeout_s: for one answer, further attempts included.
    """

    def __init__(self, config: InferenceConfig, timeout_s: float) -> None:
        self._url = f"{config.external_url}/chat/completions"
        self._common = {"model": config.external_model, "max_tokens": config.max_action_tokens}
        self._timeout_s = timeout_s

    def player(self, rollout: rollout_pb2.Rollout) -> Player:
        """Who decides in one episode."""
        return _ExternalPlayer(self, rollout.temperature, rollout.seed)

    async def answer(self, messages: Sequence[Mapping[str, Any]], temperature: float, seed: int) -> str:
        """What the policy says.

        Raises:
            InferenceFailed: the server refuses, or there is no answer in time.
        """
        body = {**self._common, "messages": messages, "temperature": temperature, "seed": seed % 2**31}
        deadline_s = time.monotonic() + self._timeout_s
        pauses = Pauses()
        reason = "none was asked for"
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                return await asyncio.to_thread(self._ask, body, left_s)
            except _Unavailable as error:
                reason = str(error)
            await pauses.take()
        raise InferenceFailed(f"no answer within {self._timeout_s:g} s; the last was {reason}")

    def _ask(self, body: Mapping[str, Any], timeout_s: float) -> str:
        try:
            with urllib.request.urlopen(request(self._url, dict(body)), timeout=timeout_s) as reply:
                answer = json.load(reply)
            return str(answer["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            reason = f"{self._url}: {error.code} {_one_line(error.read().decode(errors='replace'))}"
            if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code == HTTPStatus.TOO_MANY_REQUESTS:
                raise _Unavailable(reason) from error
            raise InferenceFailed(reason) from error
        except OSError as error:
            raise _Unavailable(f"{self._url}: {_one_line(str(error))}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InferenceFailed(f"{self._url}: no answer of OpenAI's protocol ({_one_line(str(error))})") from error


class _ExternalPlayer(Player):
    def __init__(self, policy: ExternalPolicy, temperature: float, seed: int) -> None:
        self._policy = policy
        self._temperature = temperature
        self._seed = seed
        self._images: dict[str, bytes] = {}

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Ask for an action.

        Raises:
            InferenceFailed: there is none in time.
        """
        prompt = conversation.prompt()
        known = {**self._images, screenshot.hash: screenshot.data}
        self._images = {name: known[name] for name in prompt.images}
        messages = chat_messages(prompt.messages, self._images)
        started_s = time.monotonic()
        text = await self._policy.answer(messages, self._temperature, derive_seed(self._seed, index))
        act_s = time.monotonic() - started_s
        metrics.ACT_SECONDS.observe(act_s)
        conversation.respond(text)
        step = Step(index, screenshot.hash, prompt.images, text, temperature=self._temperature)
        return Decision(step, {"act": 1000 * act_s})


def chat_messages(
    messages: Sequence[inference_pb2.ChatMessage], images: Mapping[str, bytes]
) -> list[dict[str, str | list[dict[str, Any]]]]:
    """A conversation as the protocol has it, screenshots (PNG, by hash) inside."""
    return [
        {"role": _ROLES[message.role], "content": [_part(content, images) for content in message.contents]}
        for message in messages
    ]


def _part(content: inference_pb2.Content, images: Mapping[str, bytes]) -> dict[str, Any]:
    if content.WhichOneof("kind") == "image_hash":
        data = base64.b64encode(images[content.image_hash]).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "text", "text": content.text}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
