"""External policies: act through a server that returns text or tool calls, by one of three protocols.

Such a server reports neither token ids nor logprobs nor policy versions, so the steps contain none. Its episodes can be
evaluated but not trained on.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from deskrl.actor import metrics
from deskrl.actor.agent.action_language import ToolApiLanguage
from deskrl.actor.agent.conversation import ChatPrompt, Conversation
from deskrl.actor.agent.external_server import UnavailableError, send_request
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.backoff import Backoff
from deskrl.actor.thread_pool import run_unawaited
from deskrl.core.config import AgentConfig, InferenceConfig
from deskrl.core.error_text import one_line
from deskrl.core.ids import derive_seed
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, inference_pb2, rollout_pb2

Reply = TypeVar("Reply")

_ROLES = {
    inference_pb2.MESSAGE_ROLE_SYSTEM: "system",
    inference_pb2.MESSAGE_ROLE_USER: "user",
    inference_pb2.MESSAGE_ROLE_ASSISTANT: "assistant",
}
_LONGEST_PAUSE_S = 8.0


class ExternalClient:
    """Client of an external server.

    The standard library's HTTP client suffices: one POST per action, and no dependency that only this class needs.

    Args:
        config: address and protocol of the server, name of the model, and maximum number of tokens of an action.
        timeout_s: timeout in seconds for one response, including further attempts.
    """

    def __init__(self, config: InferenceConfig, timeout_s: float) -> None:
        self.config = config
        self._timeout_s = timeout_s

    def open_policy(self, rollout: rollout_pb2.Rollout) -> ActorPolicy:
        """Return the policy of the chat completions endpoint for one rollout."""
        return ChatPolicy(self, rollout.temperature, rollout.seed)

    async def complete(self, messages: Sequence[Mapping[str, Any]], temperature: float, seed: int) -> str:
        """Return the text of the model's response to a conversation, from the chat completions endpoint.

        Args:
            messages: conversation as returned by `chat_messages`.
            temperature: sampling temperature.
            seed: sampling seed, of which the lowest 31 bits are sent.

        Raises:
            InferenceError: the server rejected the request or did not respond in time.
        """
        fields = {
            "max_tokens": self.config.max_action_tokens,
            "messages": messages,
            "temperature": temperature,
            "seed": seed % 2**31,
        }
        return await self.post(
            "chat/completions", fields, lambda reply: str(reply["choices"][0]["message"]["content"] or "")
        )

    async def post(
        self,
        path: str,
        fields: Mapping[str, Any],
        read: Callable[[Any], Reply],
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request, again with growing pauses while the server is unavailable, and return what `read` returns.

        Args:
            path: path of the endpoint below the server's address.
            fields: fields of the request, without the model's name and the parameters of the configuration.
            read: reads the JSON value of the response. It may raise UnavailableError; other exceptions mean that the
                response does not follow the protocol.
            headers: further headers.

        Raises:
            InferenceError: the server rejected the request or did not respond in time.
        """
        body = {"model": self.config.external_model, **fields, **self.config.external_parameters}
        deadline_s = time.monotonic() + self._timeout_s
        backoff = Backoff(longest_s=_LONGEST_PAUSE_S)
        reason = ""
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                reply = await run_unawaited(partial(send_request, self.config, path, body, left_s, headers))
                return self._read(path, reply, read)
            except UnavailableError as error:
                if not reason or time.monotonic() < deadline_s:  # else the limit is the cause, not the server
                    reason = str(error)
                pause_s = error.retry_after_s
            if pause_s is None:
                await backoff.sleep()
            else:
                await asyncio.sleep(min(pause_s, max(0.0, deadline_s - time.monotonic())))
        raise InferenceError(f"no response within {self._timeout_s:g} s; last error: {reason}")

    def _read(self, path: str, reply: Any, read: Callable[[Any], Reply]) -> Reply:
        try:
            return read(reply)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            vendor = "Anthropic" if self.config.external_api == "anthropic_messages" else "OpenAI"
            problem = f"no valid response of {vendor}'s protocol ({one_line(error, 300)})"
            raise InferenceError(f"{self.config.external_url}/{path}: {problem}") from error


class ExternalPolicy(ActorPolicy):
    """Policy on an external server; derived classes speak a protocol.

    Args:
        client: client of the server.
        temperature: sampling temperature that is recorded with the steps.
    """

    def __init__(self, client: ExternalClient, temperature: float) -> None:
        self._client = client
        self._temperature = temperature
        self._images: dict[str, bytes] = {}

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Request an action (see the base class).

        Raises:
            InferenceError: the server rejected the request or did not respond in time.
        """
        prompt = conversation.prompt()
        self.add_screenshot(screenshot)
        self._images = {name: self._images[name] for name in prompt.images}
        started_s = time.monotonic()
        text = await self._respond(prompt, screenshot, index)
        text = text.encode(errors="replace").decode()  # JSON can write halves of surrogate pairs
        act_s = time.monotonic() - started_s
        metrics.ACT_SECONDS.observe(act_s)
        conversation.respond(text)
        step = Step(index, screenshot.hash, prompt.images, text, temperature=self._temperature)
        return Decision(step, {"act": 1000 * act_s})

    def add_screenshot(self, screenshot: common_pb2.Image) -> None:
        """Add a screenshot (see the base class)."""
        self._images[screenshot.hash] = screenshot.data

    @abstractmethod
    async def _respond(self, prompt: ChatPrompt, screenshot: common_pb2.Image, index: int) -> str:
        """Return the text of the response to a prompt, whose screenshots are `self._images`."""


class ChatPolicy(ExternalPolicy):
    """Policy of a chat completions endpoint, which gets the whole conversation as text and images.

    Args:
        client: client of the server.
        temperature: sampling temperature.
        seed: seed of the episode.
    """

    def __init__(self, client: ExternalClient, temperature: float, seed: int) -> None:
        super().__init__(client, client.config.external_parameters.get("temperature", temperature))
        self._seed = seed

    async def _respond(self, prompt: ChatPrompt, screenshot: common_pb2.Image, index: int) -> str:
        messages = chat_messages(prompt.messages, self._images)
        return await self._client.complete(messages, self._temperature, derive_seed(self._seed, index))


class ToolApiPolicy(ExternalPolicy):
    """Policy of an API with tool calls. A response with several actions is executed as several steps.

    The text of a step is the response in the action language of the API. The policy keeps the conversation in the form
    of the API, because it has more than this text: ids of calls, and reasoning that is sent back unchanged.

    Args:
        client: client of the server.
        language: action language of the API.
        config: section `agent` of the run configuration.
        rollout: rollout, whose temperature and seed such an API does not take.
    """

    def __init__(
        self, client: ExternalClient, language: ToolApiLanguage, config: AgentConfig, rollout: rollout_pb2.Rollout
    ) -> None:
        temperature = client.config.external_parameters.get("temperature", 1.0)
        super().__init__(client, float(temperature) if isinstance(temperature, int | float) else 1.0)
        self._language = language
        self._config = config
        self._pending: deque[str] = deque()

    async def _respond(self, prompt: ChatPrompt, screenshot: common_pb2.Image, index: int) -> str:
        self._observe(screenshot)
        if not self._pending:
            self._pending.extend(await self._request(prompt, screenshot))
        return self._pending.popleft()

    def _instructions(self, prompt: ChatPrompt) -> str:
        """Return the system prompt: that of the API, unless the configuration replaces the prompt."""
        if self._config.prompt == "full" and self._config.prompt_file is None:
            return self._language.api_instructions(self._config)
        return prompt.messages[0].contents[0].text

    @abstractmethod
    def _observe(self, screenshot: common_pb2.Image) -> None:
        """Record the screenshot after the last action, or the first one."""

    @abstractmethod
    async def _request(self, prompt: ChatPrompt, screenshot: common_pb2.Image) -> list[str]:
        """Request a response, and return the texts of its actions, at least one."""


def chat_messages(
    messages: Sequence[inference_pb2.ChatMessage], images: Mapping[str, bytes]
) -> list[dict[str, str | list[dict[str, Any]]]]:
    """Return a conversation in the format of the chat completions endpoint.

    Args:
        messages: messages with text and image hashes.
        images: PNG data by hash; it is embedded in the messages.
    """
    return [
        {"role": _ROLES[message.role], "content": [_part(content, images) for content in message.contents]}
        for message in messages
    ]


def data_url(png: bytes) -> str:
    """Return a PNG file as a URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def response_text(thought: str, call: Mapping[str, Any]) -> str:
    """Return a response in the action language of an API: the thought, then a call on the last line.

    A line of the thought that begins like a call is indented, so that it is not taken for one.
    """
    lines = (f" {line}" if line.startswith("{") else line for line in thought.strip().split("\n"))
    return "\n".join([*lines, json.dumps(call, ensure_ascii=False)])


def _part(content: inference_pb2.Content, images: Mapping[str, bytes]) -> dict[str, Any]:
    if content.WhichOneof("kind") == "image_hash":
        return {"type": "image_url", "image_url": {"url": data_url(images[content.image_hash])}}
    return {"type": "text", "text": content.text}
