"""Which role may call what, and the door at which a server asks for it. Knows no file."""

from __future__ import annotations

import hmac
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from deskrl.core.security.identity import Identity

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

CALLERS = {
    "deskrl.proto.v1.RolloutService": frozenset({"actor"}),
    "deskrl.proto.v1.ReplayService": frozenset({"learner", "operator"}),
    "deskrl.proto.v1.InferenceService": frozenset({"actor", "learner", "operator"}),
    "deskrl.proto.v1.WeightService": frozenset({"learner"}),
    "deskrl.proto.v1.DirectoryService": frozenset({"actor", "learner", "operator"}),
    "deskrl.proto.v1.DirectoryService/Announce": frozenset({"inference"}),
}
"""Who may call a service, or one method of it; what is not named here (health, reflection) is for every role."""


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Lets in who knows the token and whose certificate names a role that may call the service."""

    def __init__(self, identity: Identity) -> None:
        self._expected = f"Bearer {identity.token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Put the check before every handler, where the caller's certificate is known."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        return _guarded(handler, lambda context: self._admit(method, context))

    async def _admit(self, method: str, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get("authorization", "")
        if not hmac.compare_digest(token.encode() if isinstance(token, str) else token, self._expected):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is another one")
        role = b"".join(context.auth_context().get("x509_common_name", ())).decode(errors="replace")
        service = method.partition("/")[0]
        allowed = CALLERS.get(method, CALLERS.get(service))
        if allowed is not None and role not in allowed:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{method} is not for the role {role}")


def _guarded(handler: Handler, admit: Callable[[Context], Awaitable[None]]) -> Handler:
    """The same handler behind a check."""
    kinds = ("unary", "stream")
    kind = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
    behaviour = getattr(handler, kind)

    async def respond(request: Any, context: Context) -> Any:
        await admit(context)
        return await behaviour(request, context)

    async def stream(request: Any, context: Context) -> None:
        await admit(context)
        responses = behaviour(request, context)
        if not inspect.isasyncgen(responses):  # it writes them itself
            await responses
            return
        async for response in responses:
            await context.write(response)

    make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded = stream if handler.response_streaming else respond
    return make(guarded, handler.request_deserializer, handler.response_serializer)
