"""Lockstep schedule: a round starts when every desktop asks for work, a step when every running episode asks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import grpc
import pytest
from replay_kit import TEST_PEER, ReplayClient, StartReplay, begin, result, steps

from deskrl.proto.v1 import rollout_pb2

NUM_DESKTOPS = 4  # default of the configuration
EVALUATION = 2**32 - 1

Lease = rollout_pb2.AcquireLeaseResponse


@pytest.fixture
def client(start_replay: StartReplay) -> ReplayClient:
    return start_replay(schedule="lock_step", staleness=0, rollouts=2, groups_per_batch=2).client()


@pytest.fixture
def desktops() -> Iterator[ThreadPoolExecutor]:
    """Return a pool with one thread per desktop."""
    with ThreadPoolExecutor(NUM_DESKTOPS) as pool:
        yield pool


def start_round(client: ReplayClient, desktops: ThreadPoolExecutor) -> list[Lease]:
    asking = [desktops.submit(client.acquire, wait_s=10) for _ in range(NUM_DESKTOPS)]
    return [future.result() for future in asking]


def await_step(client: ReplayClient, lease: Lease, step: int, wait_s: float = 10) -> bool:
    request = rollout_pb2.AwaitTurnRequest(peer=TEST_PEER, lease_id=lease.lease_id, turn=step, wait_s=wait_s)
    return bool(client.rollout.AwaitTurn(request, timeout=60).is_open)


def test_a_round_starts_when_all_desktops_ask_and_no_episode_runs(
    client: ReplayClient, desktops: ThreadPoolExecutor
) -> None:
    for number in range(4):
        client.plan(f"eval/{number}")
    early = [desktops.submit(client.acquire, wait_s=0.3) for _ in range(NUM_DESKTOPS - 1)]
    assert not any(future.result().lease_id for future in early), "one desktop has not asked"
    leases = start_round(client, desktops)
    assert all(lease.lease_id for lease in leases)
    for lease in leases[1:]:
        client.run_episode(lease, reward=0.0)
    second = [desktops.submit(client.acquire, wait_s=0.3) for _ in range(NUM_DESKTOPS)]
    assert not any(future.result().lease_id for future in second), "one episode of the first round still runs"
    client.run_episode(leases[0], reward=0.0)
    assert all(lease.lease_id for lease in start_round(client, desktops))


def test_a_step_opens_when_every_running_episode_has_reached_it(
    client: ReplayClient, desktops: ThreadPoolExecutor
) -> None:
    client.plan("train/0")
    client.plan("train/1")
    leases = start_round(client, desktops)
    assert not await_step(client, leases[0], 0, wait_s=0.1)
    opened: list[Future[bool]] = [desktops.submit(await_step, client, lease, 0) for lease in leases]
    assert all(future.result() for future in opened)
    # One waits for its evaluation, one has its result, one is released: the last must wait for none of them.
    done = desktops.submit(await_step, client, leases[0], EVALUATION)
    assert not await_step(client, leases[1], 1, wait_s=0.1)
    client.stream([begin(leases[2]), *steps(leases[2], range(2)), result(0.0, 2)])
    client.release(leases[3].lease_id)
    assert await_step(client, leases[1], 1)
    assert not done.done()
    assert await_step(client, leases[1], EVALUATION)
    wait([done])
    assert done.result()


def test_an_unknown_lease_is_rejected(client: ReplayClient) -> None:
    with pytest.raises(grpc.RpcError) as rejected:
        await_step(client, Lease(lease_id="unknown-lease"), 0)
    assert rejected.value.code() == grpc.StatusCode.NOT_FOUND


def test_without_lockstep_every_step_is_open(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("train/0")
    assert await_step(client, client.acquire(), EVALUATION, wait_s=0)
