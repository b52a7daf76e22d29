"""gRPC channels and servers with deskrl's message limits, keep-alive, retries, mutual TLS, health and reflection.

A process has at most one identity, set by `set_identity`. With an identity, every channel is encrypted and both ends
authenticate each other. Without one, only loopback addresses are served. A process belongs to at most one run, set by
`set_run`; its servers reject the processes of other runs.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deskrl.core.addresses import HostPort
from deskrl.core.errors import UserError
from deskrl.core.listening import bind_error, listen_error
from deskrl.core.request_decoding import RequestDecodingInterceptor
from deskrl.core.run_identity import OTHER_RUN, RunIdentity, RunInterceptor
from deskrl.core.security.authorization import AuthInterceptor
from deskrl.core.security.peer_identity import Identity, check_mutual_trust, load_identity
from deskrl.proto.v1 import common_pb2

M = TypeVar("M", bound=Message)

VERSION = metadata.version("deskrl")

PROTOCOL_VERSION = 1
"""Version of the protocol; a service rejects callers that use a different one."""

MAX_MESSAGE_BYTES = 64 * 1024**2
CHUNK_BYTES = 1024**2
UNARY_TIMEOUT_S = 20.0

# Idempotent calls (see the comments of the .proto files). Streams are resumed by their callers.
_RETRIED = {
    "deskrl.proto.v1.RolloutService": ["AcquireLease", "AwaitTurn", "ExtendLeases", "ReleaseLeases"],
    "deskrl.proto.v1.ReplayService": [
        "PlanGroups",
        "SetPolicyVersion",
        "TakeGroup",
        "CommitBatch",
        "GetReplayStatus",
    ],
    "deskrl.proto.v1.DirectoryService": ["ListReplicas"],
    "deskrl.proto.v1.InferenceService": ["Act", "GetModelInfo"],
    "deskrl.proto.v1.WeightService": ["GetWeightStatus"],
}

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for service, ms in _RETRIED.items() for method in ms],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

CHANNEL_OPTIONS: list[tuple[str, object]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A restarted role is available within seconds, so reconnect often (the default backoff grows to two minutes).
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Roles reach one another directly; otherwise gRPC would use the proxy of http_proxy, https_proxy or grpc_proxy.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", _SERVICE_CONFIG),
]

MAX_CONNECTION_IDLE_S = 300.0
"""Time without a call after which a server closes a connection; the next call of the client opens a new one.

A call that waits, such as for a lease, keeps its connection open.
"""


def _server_options() -> list[tuple[str, object]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.max_connection_idle_ms", round(1000 * MAX_CONNECTION_IDLE_S)),
        # Pings detect clients that have vanished without closing their connection.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
    ]


def peer(role: str, name: str) -> common_pb2.Peer:
    """Return the description of the calling process that requests carry, including the protocol version."""
    return common_pb2.Peer(role=role, name=name, protocol=PROTOCOL_VERSION, version=VERSION)


def split_by_size(messages: Iterable[M], max_bytes: int = MAX_MESSAGE_BYTES // 2) -> Iterator[list[M]]:
    """Yield the messages, in order, in lists of limited size: several requests for what does not fit into one.

    Args:
        messages: messages of a repeated field.
        max_bytes: limit on the size of a list, unless it has only one message.
    """
    part: list[M] = []
    num_bytes = 0
    for message in messages:
        size = message.ByteSize()
        if part and num_bytes + size > max_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(message)
        num_bytes += size
    if part:
        yield part


def service_status(started_s: float) -> common_pb2.ServiceStatus:
    """Return version and uptime of a service.

    Args:
        started_s: value of `time.monotonic` at which the service started.
    """
    return common_pb2.ServiceStatus(version=VERSION, uptime_s=time.monotonic() - started_s, unix_s=time.time())


def protocol_mismatch(caller: common_pb2.Peer) -> str | None:
    """Return the error message for a caller with another protocol version; None if the versions match."""
    if caller.protocol == PROTOCOL_VERSION:
        return None
    return (
        f"protocol version mismatch: {caller.role or 'caller'} {caller.name} uses version {caller.protocol}, "
        f"this service version {PROTOCOL_VERSION}; install the same version of deskrl on both sides"
    )


_identity: Identity | None = None
_run: RunIdentity | None = None


def set_run(run: RunIdentity | None) -> None:
    """Set the run of all channels and servers that this process creates; None for no run."""
    global _run
    _run = run


def current_run() -> RunIdentity | None:
    """Return the run of this process; None if it was not set."""
    return _run


def set_identity(identity: Identity | None) -> None:
    """Set the identity of all channels and servers that this process creates; None for unencrypted loopback."""
    global _identity
    _identity = identity


def load_own_identity(role: str, folder: Path | None) -> None:
    """Call `set_identity` with an identity read from a directory of certificates.

    Args:
        role: role of this process.
        folder: directory of certificates; None for no identity.

    Raises:
        UserError: the identity cannot be loaded or is not valid (see `load_identity`).
    """
    set_identity(None if folder is None else load_identity(folder, role))


def connect(address: str, *, retry: bool = True) -> grpc.aio.Channel:
    """Return a channel, which connects on first use and reconnects automatically.

    Args:
        address: `host:port` of the server.
        retry: retry idempotent calls while the server is unavailable; False if the caller tries another server instead.
    """
    options = [*_channel_options(), ("grpc.enable_retries", int(retry))]
    if _identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _channel_credentials(_identity), options=options)


def connect_sync(address: str) -> grpc.Channel:
    """Return a synchronous channel with the same options, for callers without an event loop."""
    if _identity is None:
        return grpc.insecure_channel(address, options=_channel_options())
    return grpc.secure_channel(address, _channel_credentials(_identity), options=_channel_options())


def _channel_options() -> list[tuple[str, object]]:
    """Return the options of a channel, with this process's run as part of the user agent.

    Unlike an interceptor, the user agent costs nothing per call; unlike call credentials, it needs no encryption.
    """
    return CHANNEL_OPTIONS if _run is None else [*CHANNEL_OPTIONS, ("grpc.secondary_user_agent", _run.to_user_agent())]


def _channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    encryption = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
    return grpc.composite_channel_credentials(encryption, grpc.access_token_call_credentials(identity.token))


def make_server() -> grpc.aio.Server:
    """Return a server with deskrl's limits, authorisation, check of the run and decoding, without services."""
    # The first interceptor is the outermost one: an unauthenticated caller does not learn which run this is.
    interceptors: list[grpc.aio.ServerInterceptor] = [AuthInterceptor(_identity)] if _identity else []
    interceptors += [RunInterceptor(_run)] if _run else []
    interceptors.append(RequestDecodingInterceptor())
    return grpc.aio.server(options=_server_options(), interceptors=interceptors)


async def start_server(
    server: grpc.aio.Server, address: str, services: Sequence[str], key: str = "replay.address"
) -> health.aio.HealthServicer:
    """Add health checking and reflection to a server, bind it to its address and start it.

    Args:
        server: server to which its own services have been added.
        address: `host:port`; a loopback address if this process has no identity.
        services: full names of the services that the health service reports as SERVING.
        key: configuration key of the address, for error messages.

    Raises:
        UserError: the address cannot be listened on, or is reachable from other machines while this process has no
            identity.
    """
    check_exposure(address)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        if _identity is None:
            server.add_insecure_port(address)
        else:
            pair = (_identity.key, _identity.certificate)
            server.add_secure_port(address, grpc.ssl_server_credentials([pair], _identity.ca, require_client_auth=True))
    except RuntimeError as error:
        raise _listen_error(key, HostPort(address)) from error
    await server.start()
    for service in ["", *services]:
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return health_servicer


def _listen_error(key: str, address: HostPort) -> UserError:
    """Return the error of a server that cannot listen; gRPC does not report the cause, so it is determined here."""
    cause = bind_error(address.host, address.port)
    if cause is None:
        return UserError(f"{key}: cannot listen on {address}", "run the same command again; the cause has ended")
    return listen_error(key, address.host, address.port, cause)


def check_exposure(address: str) -> None:
    """Raise UserError if `host:port` is reachable from other machines and this process has no identity."""
    if not is_loopback(HostPort(address).host) and _identity is None:
        raise UserError(
            f"{address} is reachable from other machines",
            "use a loopback address such as 127.0.0.1:7411, or create certificates (`deskrl certificates`) and name "
            "their directory in security.certificates_dir",
        )


def is_loopback(host: str) -> bool:
    """Return whether a server at this host is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_health(address: str, timeout_s: float = 2.0) -> bool:
    """Return whether the server at `address` reports SERVING.

    Raises:
        UserError: authentication or authorisation fails, or the server belongs to another run, so that a retry cannot
            succeed.
    """
    with connect_sync(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            if (rejection := rejection_error(error, address)) is not None:
                raise rejection from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                check_mutual_trust(address, _identity)
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def is_healthy(address: str, timeout_s: float = 2.0) -> bool:
    """Return whether the server at `address` reports SERVING; False for any failure."""
    try:
        return check_health(address, timeout_s)
    except UserError:
        return False


AUTH_ERROR_CODES = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})
"""Status codes of failed authentication or authorisation; a retry cannot succeed."""


def status_code(error: grpc.RpcError) -> grpc.StatusCode:
    """Return the status code of a failed call, with UNAVAILABLE for every broken connection.

    gRPC reports UNKNOWN both for errors of the server and for connections that break on corrupted bytes; the latter
    are recognised by their text.
    """
    code: grpc.StatusCode = error.code()
    is_broken = code is grpc.StatusCode.UNKNOWN and (error.details() or "").startswith("Stream removed")
    return grpc.StatusCode.UNAVAILABLE if is_broken else code


def rejection_error(error: grpc.RpcError, address: str) -> UserError | None:
    """Return the error for users if the server accepts no call of this process at all; None for other failures."""
    if error.code() in AUTH_ERROR_CODES:
        return UserError(
            f"the server at {address} rejected this process: {error.details()}", "correct security.certificates_dir"
        )
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and (error.details() or "").startswith(OTHER_RUN):
        return UserError(f"{address}: {error.details()}", "possibly end the other run, or choose another address")
    return None


def describe_error(error: grpc.RpcError) -> str:
    """Return status code and details of a failed call as one text."""
    return f"{error.code().name}: {error.details()}"
