"""Channels between roles: what must hold on every one of them, whatever is spoken over it."""

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports_kit import free_address

from deskrl.core import rpc


def test_a_channel_that_is_idle_and_kept_alive_is_not_dropped() -> None:
    """A server that finds pings too frequent closes the connection under the next call: perhaps a weight update."""

    async def idle_then_call() -> health_pb2.HealthCheckResponse.ServingStatus:
        address = free_address()
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        hasty = {"grpc.keepalive_time_ms": 1_200, "grpc.http2.max_pings_without_data": 0}
        options = list((dict(rpc.CHANNEL_OPTIONS) | hasty).items())
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
