"""OpenAI-compatible chat server that answers with a script, one text for each turn of the conversation.

python scripted_chat_server.py PORT TEXT ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


def make_app(texts: list[str]) -> Starlette:
    """Return the application, which streams the answers as events."""

    async def complete(request: Request) -> StreamingResponse:
        messages = (await request.json())["messages"]
        turn = sum(message["role"] == "assistant" for message in messages)
        return StreamingResponse(_events(texts[turn]), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])


def _events(text: str) -> Iterator[str]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": text}, {}]
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "scripted", "choices": [choice]}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[2:]), port=int(sys.argv[1]), log_level="warning")
