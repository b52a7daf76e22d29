"""Servers reject the processes of another run, by every kind of call, and name both runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports_kit import free_address

from deskrl.core import rpc
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import OTHER_RUN, RunIdentity, parse_user_agent, read_identity
from deskrl.inference.registration import register_replica
from deskrl.inference.served_version import INITIAL_VERSION

A = RunIdentity("a", "a" * 32, "machine", Path("/runs/a"))


@pytest.fixture(autouse=True)
def forget_the_run() -> Iterator[None]:
    yield
    rpc.set_run(None)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (RunIdentity("a", "a" * 32, "machine"), True),
        (RunIdentity("renamed", "a" * 32, "elsewhere"), True),  # the run directory is renamed, or on a network disk
        (RunIdentity("a", "b" * 32, "machine"), False),  # a new run of the same name
        (RunIdentity("a", "b" * 32, "elsewhere"), True),  # a machine that has prepared a directory of its own
        (RunIdentity("a", "", "elsewhere"), True),  # an actor without a run directory
        (RunIdentity("b", "", "elsewhere"), False),
        (RunIdentity("b", "b" * 32, "elsewhere"), False),
    ],
)
def test_runs_are_the_same_by_id_on_one_machine_and_by_name_between_machines(other: RunIdentity, is_same: bool) -> None:
    assert A.is_same_run(other) == other.is_same_run(A) == is_same
    assert parse_user_agent(f"grpc-c/39 (linux) {other.to_user_agent()}") == other


@pytest.mark.parametrize("agent", ["", "grpc-python/1.80", "deskrl-run/", "deskrl-run/a b/0/c"])
def test_other_user_agents_name_no_run(agent: str) -> None:
    assert parse_user_agent(agent) is None


def test_the_id_of_a_run_directory_is_written_once_and_damage_means_unknown(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "a")
    assert read_identity(run_dir, "a").id == ""
    run_dir.create()
    first = run_dir.read_id()
    run_dir.create()
    assert run_dir.read_id() == first and len(first) == 32
    run_dir.id.write_bytes(b"\xff/../ \n")
    assert run_dir.read_id() == ""


def test_a_server_rejects_calls_of_another_run_by_every_kind_of_channel() -> None:
    async def serve_and_call() -> None:
        address = free_address()
        rpc.set_run(A)
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        assert await asyncio.to_thread(rpc.check_health, address)
        rpc.set_run(None)
        assert await asyncio.to_thread(rpc.check_health, address), "a health probe names no run"
        rpc.set_run(RunIdentity("b", "b" * 32, "machine"))
        assert not await asyncio.to_thread(rpc.is_healthy, address)
        with pytest.raises(UserError, match=rf"{address}: {OTHER_RUN}: a \(/runs/a\), not b \(hint: "):
            await asyncio.to_thread(rpc.check_health, address)
        async with rpc.connect(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await stub.Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.aio.AioRpcError) as stream:
                await stub.Watch(health_pb2.HealthCheckRequest()).read()
        for error in (unary.value, stream.value):
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            rejection = rpc.rejection_error(error, address)
            assert rejection is not None and OTHER_RUN in rejection.message
        await server.stop(None)

    asyncio.run(serve_and_call())


def test_a_replica_does_not_join_another_run() -> None:
    async def serve_and_join() -> None:
        address = free_address()
        rpc.set_run(A)
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        rpc.set_run(RunIdentity("b"))
        with pytest.raises(UserError, match=rf"{address}: {OTHER_RUN}: a "):
            async with register_replica(address, free_address(), lambda: INITIAL_VERSION):
                raise AssertionError("the replica has joined")
        await server.stop(None)

    asyncio.run(serve_and_join())
