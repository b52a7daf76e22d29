"""Channels and servers, made one way: limits, keep-alive, retries, health, reflection, protocol hand-shake.

Knows gRPC; knows no service in particular. Only loopback is served: anything else needs authentication, which this
version does not have, so it is refused.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deskrl.core.errors import UserError
from deskrl.proto.v1 import common_pb2

# gRPC's core would write lines of its own to standard error beside the one line that a person is meant to read.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

PROTOCOL = 1
"""Version of the contracts; peers with another one refuse each other."""

MAX_MESSAGE_BYTES = 64 * 1024**2
CHUNK_BYTES = 1024**2
UNARY_TIMEOUT_S = 20.0

# Calls whose repetition changes nothing (see the .proto comments). Streams are resumed by their callers.
_RETRIED = {
    "deskrl.proto.v1.RolloutService": ["AcquireLease", "ExtendLeases", "ReleaseLeases"],
    "deskrl.proto.v1.ReplayService": [
        "PlanGroups",
        "SetPolicyVersion",
        "TakeGroup",
        "CommitBatch",
        "GetReplayStatus",
    ],
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
    return common_pb2.Peer(role=role, name=name, protocol=PROTOCOL)


def protocol_refusal(caller: common_pb2.Peer) -> str | None:
    """Why a caller is refused, as one line with the mend; None if it speaks this protocol."""
    if caller.protocol == PROTOCOL:
        return None
    return (
        f"{caller.role or 'the caller'} {caller.name} speaks protocol {caller.protocol}, this service {PROTOCOL}; "
        "install the same version of deskrl on both sides"
    )


def connect(address: str, *, retry: bool = True) -> grpc.aio.Channel:
    """A channel to `host:port`; connects when first used and reconnects by itself.

    Args:
        address: of the server.
        retry: repeat idempotent calls that find it unavailable; False where the caller rather asks another server.
    """
    return grpc.aio.insecure_channel(address, options=[*CHANNEL_OPTIONS, ("grpc.enable_retries", int(retry))])


def connect_sync(address: str) -> grpc.Channel:
    """The same for callers without an event loop (the learner)."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def make_server() -> grpc.aio.Server:
    """A server with deskrl's limits, without services yet."""
    return grpc.aio.server(options=_SERVER_OPTIONS)


async def start_server(server: grpc.aio.Server, address: str, services: Sequence[str]) -> health.aio.HealthServicer:
    """Add health and reflection, listen, start.

    Args:
        server: with its own services added.
        address: `host:port`, a loopback address.
        services: full names of the services, SERVING from now on in the health service.

    Raises:
        UserError: the address is taken, or not loopback.
    """
    refuse_exposure(address)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise UserError(f"{address} cannot be listened on (taken by another process?)", "choose a free port") from error
    await server.start()
    for service in ["", *services]:
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return health_servicer


def refuse_exposure(address: str) -> None:
    """Raise UserError unless `host:port` is a loopback address: services have no authentication yet."""
    host = address.rpartition(":")[0].strip("[]")
    loopback = host == "localhost"
    if not loopback:
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
    if not loopback:
        raise UserError(f"{address} is reachable from other machines", "use a loopback address such as 127.0.0.1:7411")


def is_healthy(address: str, timeout_s: float = 2.0) -> bool:
    """Whether the server at `address` answers SERVING."""
    with connect_sync(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
