"""External policy of Anthropic's Messages API: the computer-use tool's calls and results, with screenshots.

Format: platform.claude.com/docs/en/api/messages, and the types of the package `anthropic`.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from deskrl.actor.agent.anthropic_computer_use import BETA_HEADERS
from deskrl.actor.agent.conversation import ChatPrompt
from deskrl.actor.agent.external_policy import ToolApiPolicy, response_text
from deskrl.proto.v1 import common_pb2

_INCOMPLETE = ("max_tokens", "model_context_window_exceeded", "pause_turn", "compaction")
"""Reasons for which a response stops before its end, so that its last call may be incomplete."""
_NO_LONGER_SHOWN = {"type": "text", "text": "This screenshot is no longer shown."}


@dataclass
class _Turn:
    """Response of the model, and the screenshots after its calls."""

    content: list[dict[str, Any]]
    screenshots: list[str] = field(default_factory=list)
    """Hashes, in the order of the calls."""

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [block for block in self.content if block["type"] == "tool_use"]


class AnthropicMessagesPolicy(ToolApiPolicy):
    """Policy of the Messages API. Each request contains the conversation, with the screenshots of the context."""

    _first = ""

    def _observe(self, screenshot: common_pb2.Image) -> None:
        if not self._first:
            self._first = screenshot.hash
            self._turns: list[_Turn] = []
        else:
            self._turns[-1].screenshots.append(screenshot.hash)

    async def _request(self, prompt: ChatPrompt, screenshot: common_pb2.Image) -> list[str]:
        size = Image.open(io.BytesIO(screenshot.data)).size
        tools = self._language.tools(*size)
        fields = {
            "max_tokens": self._client.config.max_action_tokens,
            "system": self._instructions(prompt),
            "tools": tools,
            "messages": self._messages(prompt.messages[1].contents[0].text),
        }
        beta = next((BETA_HEADERS[tool["type"]] for tool in tools if tool.get("type") in BETA_HEADERS), None)
        headers = {"anthropic-beta": beta} if beta else None
        content, texts = await self._client.post("messages", fields, read_reply, headers)
        self._turns.append(_Turn(content))
        return texts

    def _messages(self, instruction: str) -> list[dict[str, Any]]:
        """Return the conversation: the task with the first screenshot, then calls and results in turn."""
        messages = [{"role": "user", "content": [{"type": "text", "text": instruction}, self._image(self._first)]}]
        for turn in self._turns:
            results = [self._result(call, name) for call, name in zip(turn.calls, turn.screenshots, strict=True)]
            messages += [{"role": "assistant", "content": turn.content}, {"role": "user", "content": results}]
        return messages

    def _result(self, call: dict[str, Any], screenshot: str) -> dict[str, Any]:
        family = {"toolset_name": call["toolset_name"]} if "toolset_name" in call else {}
        return {"type": "tool_result", "tool_use_id": call["id"], "content": [self._image(screenshot)], **family}

    def _image(self, name: str) -> dict[str, Any]:
        """Return a screenshot as a content block; text, if the context does not contain it any more."""
        if name not in self._images:
            return _NO_LONGER_SHOWN
        data = base64.b64encode(self._images[name]).decode()
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def read_reply(reply: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the content blocks of a response without fields that are null, and the texts of its actions."""
    content = [{name: value for name, value in block.items() if value is not None} for block in reply["content"]]
    for block in content:
        needed = {"tool_use": ("id", "name", "input"), "text": ("text",)}.get(block["type"], ())
        if missing := [name for name in needed if name not in block]:
            raise ValueError(f"a block of type {block['type']} has no {missing[0]}")
    return content, _texts(content, str(reply["stop_reason"]))


def _texts(content: list[dict[str, Any]], stop_reason: str) -> list[str]:
    """Return the responses, in the action language, that the content blocks of a response stand for."""
    said = "\n".join(str(block["text"]) for block in content if block["type"] == "text")
    if stop_reason in _INCOMPLETE:
        return [f"{said}\n(incomplete response: {stop_reason})"]
    calls = [block for block in content if block["type"] == "tool_use"]
    if not calls:
        return [response_text("", {"type": "text", "text": said})]
    known = ("type", "name", "input")
    return [
        response_text("" if index else said, {name: call[name] for name in known}) for index, call in enumerate(calls)
    ]
