"""Server interceptor that answers messages which cannot be decoded with INVALID_ARGUMENT, and logs them rarely.

gRPC itself logs a traceback for each such message and answers UNKNOWN, like for an error of the service.
"""

from __future__ import annotations

import inspect
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)
LOG_INTERVAL_S = 60.0
"""Shortest time between two log lines about undecodable messages."""


class UndecodableRequestError(Exception):
    """The bytes of a request are not a message of the method's type; its text names the method."""


class RequestDecodingInterceptor(grpc.aio.ServerInterceptor):
    """Server interceptor that decodes the requests of all methods in place of gRPC.

    It must be the last interceptor: those before it then see encoded requests, so that callers are authorised before
    their bytes are decoded.
    """

    def __init__(self) -> None:
        self._num_unreported = 0
        self._next_report_s = 0.0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return a handler that receives bytes, decodes them and passes the messages to the method's own handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        method, decode = handler_call_details.method.removeprefix("/"), handler.request_deserializer
        return _with_decoder(handler, _Decoder(method, decode), self._report)

    def _report(self, problem: str, context: Context) -> None:
        self._num_unreported += 1
        now_s = time.monotonic()
        if now_s < self._next_report_s:
            return
        more = f" ({self._num_unreported} such messages since the last report)" if self._num_unreported > 1 else ""
        _log.warning("%s, from %s%s", problem, context.peer(), more)
        self._num_unreported, self._next_report_s = 0, now_s + LOG_INTERVAL_S


class _Decoder:
    """Decoder of the requests of one call."""

    def __init__(self, method: str, decode: Callable[[bytes], Any]) -> None:
        self._method = method
        self._decode = decode
        self.problem = ""
        """Text of the error of a message that could not be decoded; empty if there was none."""

    def decode(self, data: bytes) -> Any:
        """Return the message.

        Raises:
            UndecodableRequestError: the bytes are not a message of the method's type.
        """
        try:
            return self._decode(data)
        except (DecodeError, ValueError):  # ValueError: text that is not UTF-8, in some versions of protobuf
            self.problem = f"{self._method}: a message of {len(data)} bytes cannot be decoded"
        # Raised here, the error refers to no other error, whose traceback would keep the bytes in memory.
        del data
        raise UndecodableRequestError(self.problem)

    async def decode_all(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """Yield each message of a stream; raises like `decode`."""
        async for data in requests:
            yield self.decode(data)


def _release_frames(error: BaseException) -> None:
    """Clear the local variables of the frames that an error refers to, among them the request.

    gRPC keeps the error of an aborted call, and the errors before it, for an unlimited time.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def _with_decoder(handler: Handler, decoder: _Decoder, report: Callable[[str, Context], None]) -> Handler:
    """Return the handler of one call whose requests are decoded by `decoder`."""
    kinds = ("unary", "stream")
    kind = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
    behaviour = getattr(handler, kind)

    async def respond(request: Any, context: Context) -> Any:
        try:
            request = decoder.decode_all(request) if handler.request_streaming else decoder.decode(request)
            responses, request = behaviour(request, context), None
            if not inspect.isasyncgen(responses):  # one response, or a handler that writes its responses itself
                return await responses
            async for response in responses:
                await context.write(response)
            return None
        except Exception as error:
            request = None
            _release_frames(error)
            if not decoder.problem:
                raise
        # Whatever the method made of the error: the cause is what the caller sent.
        report(decoder.problem, context)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, decoder.problem)

    make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(respond, None, handler.response_serializer)
