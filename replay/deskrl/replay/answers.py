"""What both servicers need to answer: refusals as statuses, the protocol hand-shake, waits that fit the deadline."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from deskrl.core import rpc
from deskrl.proto.v1 import common_pb2
from deskrl.replay.refusals import OtherProtocol, Refused

Request = TypeVar("Request")
Response = TypeVar("Response")
_Method = Callable[[Any, Request, Any], Awaitable[Response]]

MAX_WAIT_S = 60.0
_ANSWER_MARGIN_S = 0.5


def refusing(method: _Method[Request, Response]) -> _Method[Request, Response]:
    """A unary method whose `Refused` become gRPC statuses."""

    @functools.wraps(method)
    async def answer(self: Any, request: Request, context: Any) -> Response:
        try:
            return await method(self, request, context)
        except Refused as refusal:
            await context.abort(refusal.code, str(refusal))
            raise  # not reached: abort raises

    return answer


def admit(caller: common_pb2.Peer) -> None:
    """Raise OtherProtocol unless the caller speaks this version of the contracts."""
    refusal = rpc.protocol_refusal(caller)
    if refusal is not None:
        raise OtherProtocol(refusal)


def wait_within(wait_s: float, context: Any) -> float:
    """How long a call may wait: as asked, at most MAX_WAIT_S, and less than its deadline leaves."""
    left_s: float | None = context.time_remaining()
    limit_s = MAX_WAIT_S if left_s is None else min(MAX_WAIT_S, left_s - _ANSWER_MARGIN_S)
    return max(0.0, min(wait_s, limit_s))
