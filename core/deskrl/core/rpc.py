"""Channels and servers, made one way: who may call, limits, keep-alive, retries, health, reflection, hand-shake.

Knows gRPC; knows no service in particular. A process has one identity, set once by `identify`: with it every channel
is encrypted, and both ends prove who they are. Without it only loopback is served, and anything else is refused.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deskrl.core.errors import UserError
from deskrl.core.security.admission import Doorkeeper
from deskrl.core.security.identity import Identity, load_identity, refuse_stranger
from deskrl.proto.v1 import common_pb2

VERSION = metadata.version("deskrl")

PROTOCOL = 1
"""Version of the contracts; peers with another one refuse each other."""

MAX_MESSAGE_BYTES = 64 * 1024**2
CHUNK_BYTES = 1024**2
UNARY_TIMEOUT_S = 20.0

# Calls whose repetition changes nothing (see the .proto comments). Streams are resumed by their callers.
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
    # A role that was restarted is back within seconds: look often (the default grows to two minutes between looks).
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.service_config", _SERVICE_CONFIG),
]

_SERVER_OPTIONS: list[tuple[str, object]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]


def peer(role: str, name: str) -> common_pb2.Peer:
    """Who is calling, with the protocol it speaks."""
    return common_pb2.Peer(role=role, name=name, protocol=PROTOCOL, version=VERSION)


def service_status(started_s: float) -> common_pb2.ServiceStatus:
    """What a service says of itself that was started when `time.monotonic` gave `started_s`."""
    return common_pb2.ServiceStatus(version=VERSION, uptime_s=time.monotonic() - started_s, unix_s=time.time())


def protocol_refusal(caller: common_pb2.Peer) -> str | None:
    """Why a caller is refused, as one line with the mend; None if it speaks this protocol."""
    if caller.protocol == PROTOCOL:
        return None
    return (
        f"{caller.role or 'the caller'} {caller.name} speaks protocol {caller.protocol}, this service {PROTOCOL}; "
        "install the same version of deskrl on both sides"
    )


_identity: Identity | None = None


def identify(identity: Identity | None) -> None:
    """Be this on every channel and server that this process makes from now on; None: nobody, on loopback only."""
    global _identity
    _identity = identity


def identify_as(role: str, folder: Path | None) -> None:
    """`identify` by what lies in a folder of certificates; None: as nobody.

    Raises:
        UserError: as `load_identity` does.
    """
    identify(None if folder is None else load_identity(folder, role))


def connect(address: str, *, retry: bool = True) -> grpc.aio.Channel:
    """A channel to `host:port`; connects when first used and reconnects by itself.

    Args:
        address: of the server.
        retry: repeat idempotent calls that find it unavailable; False where the caller rather asks another server.
    """
    options = [*CHANNEL_OPTIONS, ("grpc.enable_retries", int(retry))]
    if _identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _channel_credentials(_identity), options=options)


def connect_sync(address: str) -> grpc.Channel:
    """The same for callers without an event loop (the learner)."""
    if _identity is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, _channel_credentials(_identity), options=CHANNEL_OPTIONS)


def _channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    encryption = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
    return grpc.composite_channel_credentials(encryption, grpc.access_token_call_credentials(identity.token))


def make_server() -> grpc.aio.Server:
    """A server with deskrl's limits, without services yet."""
    return grpc.aio.server(options=_SERVER_OPTIONS, interceptors=[Doorkeeper(_identity)] if _identity else [])


async def start_server(server: grpc.aio.Server, address: str, services: Sequence[str]) -> health.aio.HealthServicer:
    """Add health and reflection, listen, start.

    Args:
        server: with its own services added.
        address: `host:port`; without an identity, a loopback address.
        services: full names of the services, SERVING from now on in the health service.

    Raises:
        UserError: the address is taken, or neither loopback nor protected.
    """
    refuse_exposure(address)
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
        raise UserError(f"{address} cannot be listened on (taken by another process?)", "choose a free port") from error
    await server.start()
    for service in ["", *services]:
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return health_servicer


def refuse_exposure(address: str) -> None:
    """Raise UserError unless `host:port` is a loopback address, or this process has an identity to protect it by."""
    if not is_loopback(address.rpartition(":")[0].strip("[]")) and _identity is None:
        raise UserError(
            f"{address} is reachable from other machines",
            "use a loopback address such as 127.0.0.1:7411, or make certificates (`deskrl certificates`) and name "
            "their folder in security.folder",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_health(address: str, timeout_s: float = 2.0) -> bool:
    """Whether the server at `address` answers SERVING.

    Raises:
        UserError: it and this process will never trust each other: a certificate, the token, the role.
    """
    with connect_sync(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() in DISTRUST:
                raise distrust(error, address) from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                refuse_stranger(address, _identity)
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def is_healthy(address: str, timeout_s: float = 2.0) -> bool:
    """The same, where it does not matter why not."""
    try:
        return check_health(address, timeout_s)
    except UserError:
        return False


DISTRUST = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})
"""What a server answers to a caller that it will never serve."""


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """The status of a failed call: UNAVAILABLE for each connection that broke, also where gRPC's core is at a loss.

    A connection that breaks for a reason of its own (bytes that were changed on their way) ends calls as UNKNOWN, as a
    server's failure does; only the words differ.
    """
    code: grpc.StatusCode = error.code()
    is_broken = code is grpc.StatusCode.UNKNOWN and (error.details() or "").startswith("Stream removed")
    return grpc.StatusCode.UNAVAILABLE if is_broken else code


def distrust(error: grpc.RpcError, address: str) -> UserError:
    """What a person is told of an error out of `DISTRUST`."""
    return UserError(f"the server at {address} refuses this process: {error.details()}", "mend security.folder")
