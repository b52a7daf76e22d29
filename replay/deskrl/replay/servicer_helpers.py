"""Helpers of the gRPC servicers: status errors, checks of requests, and waits bounded by the caller's deadline."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from deskrl.core import rpc
from deskrl.proto.v1 import common_pb2
from deskrl.replay.status_errors import InvalidRequestError, ProtocolMismatchError, StatusError

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
_Method = Callable[[Any, Request, Any], Awaitable[Response]]

MAX_WAIT_S = 60.0
_MAX_NAME_CHARACTERS = 1024
_FREE_TEXTS = frozenset({"start_error", "dropped_because"})
"""Fields of requests with a text for people, which is not an identifier."""
_DEADLINE_MARGIN_S = 0.5
"""Time left before the caller's deadline to send the response."""


def aborts_on_status_error(method: _Method[Request, Response]) -> _Method[Request, Response]:
    """Decorate a unary method so that a `StatusError` ends the call with its gRPC status; checks identifiers first."""

    @functools.wraps(method)
    async def wrapper(self: Any, request: Request, context: Any) -> Response:
        try:
            check_names(request)
            return await method(self, request, context)
        except StatusError as error:
            await context.abort(error.code, str(error))
            raise  # not reached: abort raises

    return wrapper


def check_protocol(caller: common_pb2.Peer) -> None:
    """Raise ProtocolMismatchError unless the caller speaks this version of the protocol."""
    mismatch = rpc.protocol_mismatch(caller)
    if mismatch is not None:
        raise ProtocolMismatchError(mismatch)


def check_names(request: Message) -> None:
    """Raise InvalidRequestError if an identifier in a request is longer than 1024 characters.

    The service keeps identifiers in memory, also SQLite in the parameters of its prepared statements.
    """
    for field, value in request.ListFields():
        if field.name in _FREE_TEXTS or field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        for item in value if field.is_repeated else (value,):
            if isinstance(item, Message):
                check_names(item)
            elif len(item) > _MAX_NAME_CHARACTERS:
                raise InvalidRequestError(
                    f"{request.DESCRIPTOR.name}: {field.name} has {len(item)} characters, "
                    f"more than {_MAX_NAME_CHARACTERS}"
                )


def bounded_wait_s(wait_s: float, context: Any) -> float:
    """Return the requested wait, bounded by `MAX_WAIT_S` and by the deadline of the call."""
    left_s: float | None = context.time_remaining()
    limit_s = MAX_WAIT_S if left_s is None else min(MAX_WAIT_S, left_s - _DEADLINE_MARGIN_S)
    return max(0.0, min(wait_s, limit_s))
