"""In lock-step nobody is ahead: work comes when every desktop asks, and a turn when every running episode does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import grpc
import pytest
from replay_kit import ME, ReplayClient, StartReplay, begin, result, steps

from deskrl.proto.v1 import rollout_pb2

NUM_DESKTOPS = 4  # the configuration's default
EVALUATION = 2**32 - 1

Lease = rollout_pb2.AcquireLeaseResponse


@pytest.fixture
def client(start_replay: StartReplay) -> ReplayClient:
    return start_replay(schedule="lock_step", staleness=0, rollouts=2, groups_per_batch=2).client()


@pytest.fixture
def desktops() -> Iterator[ThreadPoolExecutor]:
    """A thread for each desktop."""
    with ThreadPoolExecutor(NUM_DESKTOPS) as pool:
        yield pool


def begin_round(client: ReplayClient, desktops: ThreadPoolExecutor) -> list[Lease]:
    asking = [desktops.submit(client.acquire, wait_s=10) for _ in range(NUM_DESKTOPS)]
    return [future.result() for future in asking]


def await_turn(client: ReplayClient, lease: Lease, turn: int, wait_s: float = 10) -> bool:
    request = rollout_pb2.AwaitTurnRequest(peer=ME, lease_id=lease.lease_id, turn=turn, wait_s=wait_s)
    return bool(client.rollout.AwaitTurn(request, timeout=20).is_open)


def test_a_round_begins_when_all_desktops_ask_and_none_is_at_work(
    client: ReplayClient, desktops: ThreadPoolExecutor
) -> None:
    for number in range(4):
        client.plan(f"eval/{number}")
    early = [desktops.submit(client.acquire, wait_s=0.3) for _ in range(NUM_DESKTOPS - 1)]
    assert not any(future.result().lease_id for future in early), "one desktop is not ready"
    leases = begin_round(client, desktops)
    assert all(lease.lease_id for lease in leases)
    for lease in leases[1:]:
        client.play(lease, reward=0.0)
    second = [desktops.submit(client.acquire, wait_s=0.3) for _ in range(NUM_DESKTOPS)]
    assert not any(future.result().lease_id for future in second), "one episode of the first round still runs"
    client.play(leases[0], reward=0.0)
    assert all(lease.lease_id for lease in begin_round(client, desktops))


def test_a_turn_opens_when_every_running_episode_has_come_as_far(
    client: ReplayClient, desktops: ThreadPoolExecutor
) -> None:
    client.plan("train/0")
    client.plan("train/1")
    leases = begin_round(client, desktops)
    assert not await_turn(client, leases[0], 0, wait_s=0.1)
    turns: list[Future[bool]] = [desktops.submit(await_turn, client, lease, 0) for lease in leases]
    assert all(future.result() for future in turns)
    # One is done acting, one gets a result without an evaluation, one is lost: the last must wait for none of them.
    done = desktops.submit(await_turn, client, leases[0], EVALUATION)
    assert not await_turn(client, leases[1], 1, wait_s=0.1)
    client.stream([begin(leases[2]), *steps(leases[2], range(2)), result(0.0, 2)])
    client.release(leases[3].lease_id)
    assert await_turn(client, leases[1], 1)
    assert not done.done()
    assert await_turn(client, leases[1], EVALUATION)
    wait([done])
    assert done.result()


def test_an_episode_that_is_not_held_is_told_so(client: ReplayClient) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        await_turn(client, Lease(lease_id="lease-of-another-day"), 0)
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND


def test_out_of_lock_step_every_turn_is_open(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("train/0")
    assert await_turn(client, client.acquire(), EVALUATION, wait_s=0)
