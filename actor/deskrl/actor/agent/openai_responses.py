"""External policy of OpenAI's Responses API: the computer-use tool's calls and their outputs, with screenshots.

Format: developers.openai.com/api/docs/guides/tools-computer-use, and the types of the package `openai`.
"""

from __future__ import annotations

import io
from collections import deque
from typing import Any

from PIL import Image

from deskrl.actor.agent.conversation import ChatPrompt
from deskrl.actor.agent.external_policy import ToolApiPolicy, data_url, response_text
from deskrl.actor.agent.external_server import UnavailableError
from deskrl.proto.v1 import common_pb2

_TRANSIENT_CODES = ("server_error", "rate_limit_exceeded")


class OpenAIResponsesPolicy(ToolApiPolicy):
    """Policy of the Responses API. The server keeps the conversation, and gets only the newest screenshots.

    `agent.context` does not apply: the server drops the oldest items if the context is full (`truncation`).
    """

    _previous_id: str | None = None

    def _observe(self, screenshot: common_pb2.Image) -> None:
        if self._previous_id is None:
            self._calls: list[dict[str, Any]] = []
            self._executing: deque[dict[str, Any]] = deque()
            self._outputs: dict[str, bytes] = {}
        elif self._executing:
            self._outputs[self._executing.popleft()["call_id"]] = screenshot.data

    async def _request(self, prompt: ChatPrompt, screenshot: common_pb2.Image) -> list[str]:
        size = Image.open(io.BytesIO(screenshot.data)).size
        tools = self._language.tools(*size)
        fields: dict[str, Any] = {
            "max_output_tokens": self._client.config.max_action_tokens,
            "instructions": self._instructions(prompt),
            "tools": tools,
            "truncation": "auto",
        }
        if self._previous_id is None:
            detail = "original" if tools[0]["type"] == "computer" else "auto"
            image = {"type": "input_image", "detail": detail, "image_url": data_url(screenshot.data)}
            task = {"type": "input_text", "text": prompt.messages[1].contents[0].text}
            fields["input"] = [{"role": "user", "content": [task, image]}]
        else:
            fields |= {"previous_response_id": self._previous_id, "input": [self._output(call) for call in self._calls]}
        self._previous_id, output, texts = await self._client.post("responses", fields, read_reply)
        self._calls = [item for item in output if item["type"] == "computer_call"]
        self._executing = deque(call for call in self._calls for _ in _actions(call))
        self._outputs = {}
        return texts

    def _output(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the screenshot after the last action of a call.

        Pending safety checks are acknowledged: an episode whose action language refuses them has ended.
        """
        image = {"type": "computer_screenshot", "image_url": data_url(self._outputs[call["call_id"]])}
        output = {"type": "computer_call_output", "call_id": call["call_id"], "output": image}
        if checks := call.get("pending_safety_checks"):
            output["acknowledged_safety_checks"] = checks
        return output


def read_reply(reply: Any) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Return the id of a response, its output items, and the texts of its actions.

    Raises:
        UnavailableError: the response failed for a reason that may pass.
        ValueError: the response failed for another reason, or does not follow the protocol.
    """
    status = reply.get("status", "completed")
    if status not in ("completed", "incomplete"):
        error = reply.get("error") or {}
        reason = f"the response has the status {status}: {error.get('code')}: {error.get('message')}"
        raise UnavailableError(reason) if error.get("code") in _TRANSIENT_CODES else ValueError(reason)
    output = list(reply["output"])
    for item in output:
        actions = _actions(item) if item["type"] == "computer_call" else [{}]
        if not actions or not all(isinstance(action, dict) for action in actions):
            raise ValueError("a computer_call has no action")
        needed = {"computer_call": "call_id", "function_call": "name", "message": "content"}.get(item["type"])
        if needed is not None and needed not in item:
            raise ValueError(f"an item of type {item['type']} has no {needed}")
    incomplete = (reply.get("incomplete_details") or {}).get("reason") or "unknown reason"
    return str(reply["id"]), output, _texts(output, "" if status == "completed" else str(incomplete))


def _actions(call: dict[str, Any]) -> list[Any]:
    """Return the actions of a call, in either field of the API."""
    return list(call.get("actions") or ([call["action"]] if call.get("action") else []))


def _texts(output: list[dict[str, Any]], incomplete: str) -> list[str]:
    """Return the responses, in the action language, that the output items of a response stand for."""
    said = "\n".join(_said(item) for item in output if item["type"] == "message")
    if incomplete:
        return [f"{said}\n(incomplete response: {incomplete})"]
    summary = "\n".join(
        str(part["text"]) for item in output if item["type"] == "reasoning" for part in item.get("summary") or ()
    )
    calls = []
    for item in output:
        if item["type"] == "computer_call":
            checks = item.get("pending_safety_checks")
            pending = {"pending_safety_checks": checks} if checks else {}
            calls += [{"type": "computer_call", "action": action, **pending} for action in _actions(item)]
        elif item["type"] == "function_call":
            calls.append({"type": "function_call", "name": item["name"], "arguments": item.get("arguments", "")})
    if not calls:
        calls, said = [{"type": "message", "content": [{"type": "output_text", "text": said}]}], ""
    return [response_text("" if index else said or summary, call) for index, call in enumerate(calls)]


def _said(item: dict[str, Any]) -> str:
    """Return the text of a message."""
    return "\n".join(str(part.get("text") or part.get("refusal") or "") for part in item["content"])
