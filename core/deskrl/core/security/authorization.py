"""Authorisation of gRPC calls: which roles may call which service, and the interceptor that enforces it."""

from __future__ import annotations

import hmac
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from deskrl.core.security.peer_identity import Identity

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

ALLOWED_ROLES = {
    "deskrl.proto.v1.RolloutService": frozenset({"actor"}),
    "deskrl.proto.v1.ReplayService": frozenset({"learner", "operator"}),
    "deskrl.proto.v1.InferenceService": frozenset({"actor", "learner", "operator"}),
    "deskrl.proto.v1.WeightService": frozenset({"learner"}),
    "deskrl.proto.v1.DirectoryService": frozenset({"actor", "learner", "operator"}),
    "deskrl.proto.v1.DirectoryService/Announce": frozenset({"inference"}),
}
"""Roles that may call a service, or one of its methods; others (health, reflection) are open to every role."""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Server interceptor that requires the run token and a certificate of a role that may call the service.

    Calls without the token end with UNAUTHENTICATED, calls of other roles with PERMISSION_DENIED.

    Args:
        identity: identity of the server, which holds the run token.
    """

    def __init__(self, identity: Identity) -> None:
        self._expected = f"Bearer {identity.token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a method so that it authorises each call before it runs."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        return guard_handler(handler, lambda context: self._authorize(method, context))

    async def _authorize(self, method: str, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get("authorization", "")
        if not hmac.compare_digest(token.encode() if isinstance(token, str) else token, self._expected):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "invalid run token")
        role = b"".join(context.auth_context().get("x509_common_name", ())).decode(errors="replace")
        service = method.partition("/")[0]
        allowed = ALLOWED_ROLES.get(method, ALLOWED_ROLES.get(service))
        if allowed is not None and role not in allowed:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"role {role} may not call {method}")


def guard_handler(handler: Handler, authorize: Callable[[Context], Awaitable[None]]) -> Handler:
    """Return a handler that authorises the call and then runs the given handler."""
    kinds = ("unary", "stream")
    kind = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
    behaviour = getattr(handler, kind)

    async def respond(request: Any, context: Context) -> Any:
        await authorize(context)
        return await behaviour(request, context)

    async def stream(request: Any, context: Context) -> None:
        await authorize(context)
        responses = behaviour(request, context)
        if not inspect.isasyncgen(responses):  # the handler writes its responses itself
            await responses
            return
        async for response in responses:
            await context.write(response)

    make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded = stream if handler.response_streaming else respond
    return make(guarded, handler.request_deserializer, handler.response_serializer)
