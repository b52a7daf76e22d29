"""A policy on somebody else's OpenAI-compatible server, looked at before it plays, and what of it cannot be known."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from deskrl.core.config import InferenceConfig
from deskrl.core.errors import UserError

_LOOK_S = 10.0
LOST = ("token ids", "logprobs", "policy versions", "what its image processor shows the model")
"""What such a server does not tell."""


def refuse_absent(config: InferenceConfig) -> None:
    """Raise UserError unless the server answers and has the model."""
    url, model = config.external_url, config.external_model
    try:
        with urllib.request.urlopen(request(f"{url}/models"), timeout=_LOOK_S) as answer:
            served = [str(one["id"]) for one in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        mend = "start the server, or name another inference.external_url (as http://host:port/v1)"
        raise UserError(f"{url}/models is not answered as OpenAI's protocol has it: {reason}", mend) from error
    if model not in served:
        raise UserError(f"{url} serves no {model}", f"set inference.external_model to one of {', '.join(served)}")


def request(url: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
    """A request of the protocol, with the key that OPENAI_API_KEY holds, if any."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)


def told_of(config: InferenceConfig) -> dict[str, Any]:
    """For an evaluation's result: who acted, and what is therefore not known."""
    return {"url": config.external_url, "model": config.external_model, "lost": list(LOST)}
