"""gRPC: keep-alive of idle connections, and requests of limited size."""

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports_kit import free_address

from deskrl.core import rpc
from deskrl.proto.v1 import replay_pb2


def test_an_idle_channel_with_keep_alive_stays_connected() -> None:
    """A server that considers pings too frequent closes the connection, which would break the next call."""

    async def idle_then_call() -> health_pb2.HealthCheckResponse.ServingStatus:
        address = free_address()
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        frequent_pings = {"grpc.keepalive_time_ms": 1_200, "grpc.http2.max_pings_without_data": 0}
        options = list((dict(rpc.CHANNEL_OPTIONS) | frequent_pings).items())
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest())
            states = []
            deadline = asyncio.get_running_loop().time() + 7.0
            while asyncio.get_running_loop().time() < deadline:
                states.append(channel.get_state())
                await asyncio.sleep(0.05)
            reply = await stub.Check(health_pb2.HealthCheckRequest())
        await server.stop(None)
        assert set(states) == {grpc.ChannelConnectivity.READY}
        return reply.status

    assert asyncio.run(idle_then_call()) == health_pb2.HealthCheckResponse.SERVING


def test_messages_are_split_into_requests_of_limited_size_in_their_order() -> None:
    groups = [replay_pb2.GroupPlan(task_json=bytes(size)) for size in (10, 10, 60, 10, 200, 10)]
    parts = [[len(group.task_json) for group in part] for part in rpc.split_by_size(groups, max_bytes=90)]
    assert parts == [[10, 10, 60], [10], [200], [10]]
    assert list(rpc.split_by_size([])) == []
