"""Requests to an external inference server, and the check that it is reachable and serves the model."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlsplit

from deskrl.actor.agent.inference_client import InferenceError
from deskrl.core import rpc
from deskrl.core.config import InferenceConfig
from deskrl.core.error_text import one_line, typed_line
from deskrl.core.errors import UserError

MAX_REPLY_BYTES = 4 * 1024**2
"""Size limit of a response in bytes; a longer one is an error."""
NOT_REPORTED = ("token ids", "logprobs", "policy versions", "what its image processor shows the model")
"""Properties of an action that such a server does not report."""
_CHECK_TIMEOUT_S = 10.0
_CHUNK_BYTES = 64 * 1024
_ERROR_CHARACTERS = 300
_ANTHROPIC_VERSION = "2023-06-01"
_DEFAULT_KEY_VARIABLES = {"anthropic_messages": "ANTHROPIC_API_KEY"}
_VENDORS = {"anthropic_messages": "Anthropic"}
_TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)


class UnavailableError(Exception):
    """The server cannot answer at present; another attempt may succeed.

    Args:
        message: cause.
        retry_after_s: time in seconds that the server asks to wait; None if it does not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def check_reachable(config: InferenceConfig) -> None:
    """Raise UserError unless the server responds and serves the configured model, and the API key is set."""
    url, model, vendor = config.external_url, config.external_model, _vendor(config)
    variable = _key_variable(config)
    if config.external_api_key_variable and not os.environ.get(variable):
        problem = f"the environment variable {variable} with the API key of {url} is not set"
        raise UserError(problem, f"export {variable}, or correct inference.external_api_key_variable")
    is_anthropic = config.external_api == "anthropic_messages"
    path = f"models/{quote(str(model), safe='')}" if is_anthropic else "models"
    try:
        reply = send_request(config, path, None, _CHECK_TIMEOUT_S)
        served = [str(entry["id"]) for entry in ([reply | {"id": model}] if is_anthropic else reply["data"])]
    except (InferenceError, UnavailableError, ValueError, KeyError, TypeError) as error:
        message = str(error) if isinstance(error, InferenceError | UnavailableError) else typed_line(error, 200)
        raise UserError(
            f"{url}/{path}: no valid response of {vendor}'s protocol: {message}", _reachability_hint(config, message)
        ) from error
    if model not in served:
        raise UserError(
            f"{url}: does not serve the model {model}", f"set inference.external_model to one of {', '.join(served)}"
        )


def _reachability_hint(config: InferenceConfig, message: str) -> str:
    """Return what to do about an error of the check."""
    if any(f": {status.value} " in message for status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)):
        return f"set the environment variable {_key_variable(config)} to a valid API key"
    hint = "start the server, or set inference.external_url to its address (such as http://host:port/v1)"
    if f": {HTTPStatus.NOT_FOUND.value} " in message and config.external_api == "anthropic_messages":
        return f"correct inference.external_model; or {hint}"
    return hint


def send_request(
    config: InferenceConfig,
    path: str,
    body: Mapping[str, Any] | None,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Return the JSON value that the server responds with.

    The API key is read from its environment variable, sent to this server only, and removed from messages of errors:
    redirections are not followed.

    Args:
        config: address and protocol of the server.
        path: path of the endpoint below the server's address.
        body: JSON body of a POST request; None for a GET request.
        timeout_s: time limit of the request and its response together, in seconds.
        headers: further headers.

    Raises:
        UnavailableError: the server cannot be reached, is overloaded, or reports an internal error.
        InferenceError: the server rejects the request, or its response is not JSON or is too long.
    """
    key = os.environ.get(_key_variable(config), "")
    url = f"{config.external_url}/{path}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {**_headers(config, key), **(headers or {})})
    deadline_s = time.monotonic() + timeout_s
    try:
        with _open(request, timeout_s) as response:
            return json.loads(b"".join(_read(response, deadline_s)))
    except urllib.error.HTTPError as error:
        raise _status_error(error, key, deadline_s) from None  # its cause has the headers, and with them the key
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(one_line(_without(key, typed_line(error)), _ERROR_CHARACTERS)) from None
    except (ValueError, RecursionError) as error:
        reason = one_line(_without(key, str(error)), _ERROR_CHARACTERS)
        raise InferenceError(f"{url}: no valid response of {_vendor(config)}'s protocol ({reason})") from None


def describe_policy(config: InferenceConfig) -> dict[str, Any]:
    """Return the description of an external policy in the result file of an evaluation."""
    return {
        "url": config.external_url,
        "model": config.external_model,
        "api": config.external_api,
        "parameters": config.external_parameters,
        "lost": list(NOT_REPORTED),
    }


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an error: the request would be repeated with the API key, at another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    """Send a request and return the open response; a proxy of the environment is used unless the server is local."""
    is_local = rpc.is_loopback(urlsplit(request.full_url).hostname or "")
    handlers = [urllib.request.ProxyHandler({})] if is_local else []
    return urllib.request.build_opener(_NoRedirection, *handlers).open(request, timeout=timeout_s)


def _read(response: http.client.HTTPResponse, deadline_s: float) -> Iterator[bytes]:
    """Yield the body of a response in parts.

    Raises:
        TimeoutError: the deadline on the monotonic clock has passed.
        ConnectionError: the connection was closed too early.
        ValueError: the response is too long.
    """
    num_bytes = 0
    while part := response.read1(_CHUNK_BYTES):
        yield part
        num_bytes += len(part)
        if num_bytes > MAX_REPLY_BYTES:
            raise ValueError(f"the response is longer than {MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline_s:
            raise TimeoutError("the response is incomplete at the time limit")
    if response.length:
        raise ConnectionError("the connection was closed before the end of the response")


def _status_error(error: urllib.error.HTTPError, key: str, deadline_s: float) -> Exception:
    """Return the exception for a response with an error status."""
    body = bytearray()
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        for part in _read(error, deadline_s):  # type: ignore[arg-type]  # it has the same methods
            body += part
    text = body.decode(errors="replace")
    reason = f"{error.url}: {error.code} {one_line(_without(key, text), _ERROR_CHARACTERS) if text else ''}"
    if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in _TRANSIENT:
        return InferenceError(reason)
    try:
        retry_after_s = max(0.0, float(error.headers.get("retry-after", "")))
    except ValueError:  # a date, or absent
        return UnavailableError(reason)
    return UnavailableError(reason, retry_after_s)


def _headers(config: InferenceConfig, key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if config.external_api == "anthropic_messages":
        return headers | {"anthropic-version": _ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})
    return headers | ({"Authorization": f"Bearer {key}"} if key else {})


def _key_variable(config: InferenceConfig) -> str:
    return config.external_api_key_variable or _DEFAULT_KEY_VARIABLES.get(config.external_api, "OPENAI_API_KEY")


def _vendor(config: InferenceConfig) -> str:
    return _VENDORS.get(config.external_api, "OpenAI")


def _without(key: str, text: str) -> str:
    return text.replace(key, "***") if key else text
