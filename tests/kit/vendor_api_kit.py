"""Local server with the protocols of Anthropic's Messages API and OpenAI's Responses API, which checks each request.

The forms of requests and replies are written from the vendors' public documentation and the types of their Python
packages. No reply was recorded from a vendor's server, because nothing outside this machine is reached.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


def _check_png(data: str) -> str:
    if not base64.b64decode(data, validate=True).startswith(b"\x89PNG"):
        raise ValueError("no PNG file")
    return data


def _check_data_url(url: str) -> str:
    prefix = "data:image/png;base64,"
    if not url.startswith(prefix):
        raise ValueError("no PNG file as a URL")
    _check_png(url.removeprefix(prefix))
    return url


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


PngUrl = Annotated[str, AfterValidator(_check_data_url)]
Text = Annotated[str, Field(min_length=1)]


class _TextBlock(_Strict):
    type: Literal["text"]
    text: Text


class _ImageSource(_Strict):
    type: Literal["base64"]
    media_type: Literal["image/png"]
    data: Annotated[str, AfterValidator(_check_png)]


class _ImageBlock(_Strict):
    type: Literal["image"]
    source: _ImageSource


class _ToolUse(_Strict):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]
    toolset_name: Literal["computer"] | None = None


class _Thinking(_Strict):
    type: Literal["thinking"]
    thinking: str
    signature: Text


class _ToolResult(_Strict):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: list[_TextBlock | _ImageBlock]
    toolset_name: Literal["computer"] | None = None


class _UserMessage(_Strict):
    role: Literal["user"]
    content: Annotated[list[_TextBlock | _ImageBlock | _ToolResult], Field(min_length=1)]


class _AssistantMessage(_Strict):
    role: Literal["assistant"]
    content: Annotated[list[_TextBlock | _ToolUse | _Thinking], Field(min_length=1)]


class _ComputerTool(_Strict):
    type: Literal["computer_20250124", "computer_20251124"]
    name: Literal["computer"]
    display_width_px: int
    display_height_px: int


class _Enabled(_Strict):
    enabled: bool


class _ComputerToolset(_Strict):
    type: Literal["computer_toolset_20260801"]
    configs: dict[Literal["cursor_position", "left_mouse_down", "left_mouse_up", "zoom"], _Enabled]


class _CustomTool(_Strict):
    name: Text
    description: Text
    input_schema: dict[str, Any]


class AnthropicRequest(_Strict):
    """Body of POST /v1/messages, as far as deskrl uses it."""

    model: Text
    max_tokens: int
    system: Text
    tools: list[_ComputerTool | _ComputerToolset | _CustomTool]
    messages: Annotated[list[_UserMessage | _AssistantMessage], Field(min_length=1)]
    thinking: dict[str, Any] | None = None


class _InputText(_Strict):
    type: Literal["input_text"]
    text: Text


class _InputImage(_Strict):
    type: Literal["input_image"]
    detail: Literal["auto", "original"]
    image_url: PngUrl


class _InputMessage(_Strict):
    role: Literal["user"]
    content: list[_InputText | _InputImage]


class _SafetyCheck(_Strict):
    id: Text
    code: str | None = None
    message: str | None = None


class _Screenshot(_Strict):
    type: Literal["computer_screenshot"]
    image_url: PngUrl


class _CallOutput(_Strict):
    type: Literal["computer_call_output"]
    call_id: Text
    output: _Screenshot
    acknowledged_safety_checks: list[_SafetyCheck] | None = None


class _Computer(_Strict):
    type: Literal["computer"]


class _ComputerPreview(_Strict):
    type: Literal["computer_use_preview"]
    display_width: int
    display_height: int
    environment: Literal["linux"]


class _Function(_Strict):
    type: Literal["function"]
    name: Text
    description: Text
    parameters: dict[str, Any]
    strict: bool


class OpenAIRequest(_Strict):
    """Body of POST /v1/responses, as far as deskrl uses it."""

    model: Text
    max_output_tokens: int
    instructions: Text
    tools: list[_Computer | _ComputerPreview | _Function]
    truncation: Literal["auto"]
    input: Annotated[list[_InputMessage | _CallOutput], Field(min_length=1)]
    previous_response_id: Text | None = None
    reasoning: dict[str, Any] | None = None


@dataclass
class Reply:
    """Prepared response to a request."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    """Time in seconds after each byte, until the client closes the connection."""


class VendorServer:
    """HTTP server that checks each request, and returns prepared replies in order.

    A request that breaks the protocol gets the status 400 with the reason, as from the vendor.

    Args:
        key: API key that each request must have.
    """

    def __init__(self, key: str = "secret-key") -> None:
        self.replies: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.models = ["computer-model"]
        self._key = key
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                problem = outer._find_problem(self.path, body)
                self._send(Reply({"error": {"message": problem}}, 400) if problem else outer.replies.pop(0))

            def do_GET(self) -> None:
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                self._send(outer._list_models(self.path))

            def _send(self, reply: Reply) -> None:
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(data))} | dict(reply.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                if not reply.pause_s:
                    self.wfile.write(data)
                    return
                with contextlib.suppress(OSError):
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply.pause_s)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self._http.shutdown()
        self._http.server_close()

    def _find_problem(self, path: str, body: dict[str, Any]) -> str | None:
        headers = self.headers[-1]
        try:
            if path == "/v1/messages":
                AnthropicRequest.model_validate(body)
                return self._find_anthropic_problem(headers, body)
            if path == "/v1/responses":
                OpenAIRequest.model_validate(body)
                return None if headers.get("authorization") == f"Bearer {self._key}" else "wrong API key"
        except ValidationError as error:
            return str(error)
        return f"no endpoint {path}"

    def _find_anthropic_problem(self, headers: Mapping[str, str], body: dict[str, Any]) -> str | None:
        betas = {"computer_20250124": "computer-use-2025-01-24", "computer_20251124": "computer-use-2025-11-24"}
        if headers.get("x-api-key") != self._key or headers.get("anthropic-version") != "2023-06-01":
            return "wrong API key or version"
        if headers.get("anthropic-beta") != betas.get(body["tools"][0]["type"]):
            return "wrong beta header"
        open_calls: Sequence[str] = ()
        for message in body["messages"]:
            blocks = message["content"]
            if message["role"] == "assistant":
                open_calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
            elif [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"] != list(open_calls):
                return "each tool_use must have its tool_result in the next message"
        return None

    def _list_models(self, path: str) -> Reply:
        if self.headers[-1].get("x-api-key", self.headers[-1].get("authorization", "")).removeprefix("Bearer ") != (
            self._key
        ):
            return Reply({"error": {"message": f"invalid key, not {self._key}"}}, 401)
        if path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": model, "object": "model"} for model in self.models]})
        model = path.removeprefix("/v1/models/")
        return Reply({"id": model, "type": "model"}) if model in self.models else Reply({"type": "error"}, 404)


def anthropic_reply(*content: Mapping[str, Any], stop_reason: str = "tool_use") -> Reply:
    """Return a message of the Messages API."""
    usage = {"input_tokens": 1500, "output_tokens": 60}
    message = {"id": "msg_01", "type": "message", "role": "assistant", "model": "computer-model", "usage": usage}
    return Reply({**message, "content": list(content), "stop_reason": stop_reason, "stop_sequence": None})


def openai_reply(*output: Mapping[str, Any], number: int = 1, status: str = "completed", **fields: Any) -> Reply:
    """Return a response of the Responses API."""
    response = {"id": f"resp_{number}", "object": "response", "created_at": 1.0, "model": "computer-model"}
    return Reply({**response, "status": status, "error": None, "output": list(output), **fields})


def check_vendor_types(request: type[BaseModel], body: Mapping[str, Any]) -> None:
    """Check a request with the types of the vendor's Python package; raises ValidationError if they do not fit."""
    if request is AnthropicRequest:
        from anthropic.types.beta.message_create_params import MessageCreateParamsNonStreaming

        TypeAdapter(MessageCreateParamsNonStreaming).validate_python(dict(body))
        return
    from openai.types.responses import ResponseInputItemParam, ToolParam

    TypeAdapter(list[ResponseInputItemParam]).validate_python(body["input"])
    TypeAdapter(list[ToolParam]).validate_python(body["tools"])
