"""Life cycle of an episode over gRPC: leased, streamed, interrupted, resumed, faulted, expired, rejected."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from replay_kit import (
    TEST_PEER,
    OpenStream,
    ReplayClient,
    ReplayProcess,
    StartReplay,
    begin,
    fault,
    replay_config,
    result,
    screenshot,
    step,
    steps,
)

from deskrl.core import ids
from deskrl.core.step_codec import decode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2


def test_an_episode_is_returned_as_it_was_sent(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    assert lease.ttl_s == 30
    assert lease.rollout == rollout_pb2.Rollout(
        episode_id="eval/0.0",
        group_id="eval/0",
        queue="eval",
        task_json=b'{"id": "task"}',
        task_id="task",
        seed=0,
        max_steps=15,
        temperature=1.0,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    client.run_episode(lease, reward=0.5, num_steps=3)

    group = client.take("eval", "batch", 0)
    assert group is not None
    (episode,) = group.episodes
    assert (episode.episode_id, episode.result.reward, episode.result.num_steps) == ("eval/0.0", 0.5, 3)
    assert [decode_step(payload).text for payload in episode.steps] == ["action 0", "action 1", "action 2"]
    shots = [decode_step(payload).screenshot for payload in episode.steps]
    assert client.fetch(reversed(shots)) == [screenshot(lease, index) for index in (2, 1, 0)]
    assert client.episodes(episode_ids=["eval/0.0"]) == [episode]


def test_a_screenshot_that_is_sent_repeatedly_is_stored_once(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=2)
    for _ in range(2):
        same = b"the desktop as it starts"
        client.stream([begin(client.acquire()), step(0, same, sent=[same, same]), result(1, 1)])
    status = client.status()
    assert (status.num_images, status.image_bytes) == (1, 24)


def test_a_step_may_name_a_screenshot_that_another_episode_sent(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=2)
    shot = b"shared"
    client.stream([begin(client.acquire()), step(0, shot, sent=[shot]), result(1, 1)])
    assert client.stream([begin(client.acquire()), step(0, shot), result(1, 1)])[-1] == (1, True)


def test_an_interrupted_stream_resumes_at_the_first_step_that_was_not_acknowledged(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    first = OpenStream(client)
    first.send(begin(lease), *steps(lease, range(2)))
    first.read_until(2)
    first.break_off()

    acks = client.stream([begin(lease), *steps(lease, range(2, 4)), result(1, 4)])
    assert acks[0] == (2, False), "the new stream starts with the number of steps on disk"
    assert acks[-1] == (4, True)
    assert client.queue_status("eval").num_steps == 4


def test_messages_that_are_sent_twice_are_stored_once(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    whole = [begin(lease), *steps(lease, range(3)), result(1, 3)]
    first = OpenStream(client)
    first.send(*whole[:-1])
    first.read_until(3)
    first.break_off()
    assert client.stream(whole)[-1] == (3, True)
    before = client.episodes()
    assert client.stream([begin(lease), result(0, 3)])[-1] == (3, True), "a second result is acknowledged"
    assert client.episodes() == before, "and changes nothing"
    assert client.queue_status("eval").num_finished == 1


def test_a_screenshot_sent_with_a_repeated_step_is_kept_for_a_later_step(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    stream = OpenStream(client)
    stream.send(begin(lease), *steps(lease, [0]))
    stream.read_until(1)
    stream.break_off()
    early = b"sent with a step that is stored already"
    again = step(0, screenshot(lease, 0), sent=[early])
    requests = [begin(lease), again, step(1, early), result(1, 2)]
    assert client.stream(requests)[-1] == (2, True)


def test_two_requests_with_one_request_id_receive_one_lease(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=2)
    lease = client.acquire(request_id="r")
    assert client.acquire(request_id="r") == lease
    assert client.acquire(request_id="s").lease_id != lease.lease_id


def test_without_work_a_lease_request_waits_until_work_is_planned(start_replay: StartReplay) -> None:
    client = start_replay().client()
    assert not client.acquire().lease_id
    waiting = client.rollout.AcquireLease.future(
        rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER, request_id="r", wait_s=20), timeout=60
    )
    client.plan("eval/0", num=1)
    assert waiting.result().rollout.episode_id == "eval/0.0"


def test_a_released_rollout_is_granted_again_and_does_not_count_as_a_fault(start_replay: StartReplay) -> None:
    client = start_replay(max_faults=0).client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    OpenStream(client).send(begin(lease), *steps(lease, range(2)))
    client.release(lease.lease_id)
    client.release(lease.lease_id)
    assert client.extend(lease.lease_id) == []
    again = client.acquire()
    assert again.rollout == lease.rollout and again.lease_id != lease.lease_id
    client.run_episode(again, reward=1, num_steps=1)
    (episode,) = client.episodes()
    assert (len(episode.steps), episode.num_faults) == (1, 0)


def test_a_faulted_rollout_is_granted_again_until_it_has_faulted_too_often(start_replay: StartReplay) -> None:
    client = start_replay(max_faults=1).client()
    client.plan("eval/0", num=1)
    for _ in range(2):
        lease = client.acquire()
        assert client.stream([begin(lease), *steps(lease, range(2)), fault()])[-1][1]
    assert not client.acquire().lease_id
    status = client.queue_status("eval")
    assert (status.num_faulted, status.num_finished, status.num_steps) == (1, 0, 0)
    assert dict(client.status().faults) == {"FAULT_KIND_DESKTOP_LOST": 2}
    assert client.status().num_images == 0, "screenshots of faulted attempts are deleted"
    (episode,) = client.episodes()
    assert not episode.HasField("result")
    assert (episode.num_faults, episode.last_fault.message) == (2, "the desktop died")


def test_connections_that_were_lost_after_an_action_are_counted_by_task(start_replay: StartReplay) -> None:
    replay = start_replay(max_faults=1)
    client = replay.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    lost = fault("closed", rollout_pb2.FAULT_KIND_CONNECTION_LOST)
    assert client.stream([begin(lease), *steps(lease, range(2)), lost])[-1][1]
    lease = client.acquire()
    assert client.stream([begin(lease), result(1.0, 0)])[-1][1]
    (task,) = client.status().lost_connections
    assert (task.task_id, task.num_lost, task.num_finished) == (lease.rollout.task_id, 1, 1)
    assert dict(client.status().faults) == {"FAULT_KIND_CONNECTION_LOST": 1}


def test_desktops_that_do_not_start_are_reported_until_they_do(start_replay: StartReplay) -> None:
    client = start_replay().client()
    for num, reason in ((2, "no display"), (0, "")):
        client.report_desktops(num, reason)
        (peer,) = client.status().peers
        assert (peer.num_desktops_set_aside, peer.start_error) == (num, reason)


def test_a_lease_that_is_not_extended_is_granted_again_and_its_holder_is_rejected(
    start_replay: StartReplay,
) -> None:
    client = start_replay(lease_ttl_s=0.3).client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    old = OpenStream(client)
    old.send(begin(lease), *steps(lease, [0]))
    old.read_until(1)
    again = client.acquire(wait_s=20)
    assert again.rollout == lease.rollout
    old.send(*steps(lease, [1]))
    assert old.read_code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as rejected:
        client.stream([begin(lease), *steps(lease, [0]), result(1, 1)])
    assert rejected.value.code() == grpc.StatusCode.NOT_FOUND
    client.release(again.lease_id)
    status = client.status()
    assert status.num_leases_expired >= 1 and not status.faults
    assert (status.num_images, status.queues[0].num_finished) == (0, 0)


def test_a_heartbeat_extends_leases_and_returns_only_those_that_are_alive(start_replay: StartReplay) -> None:
    client = start_replay(lease_ttl_s=1).client()
    client.plan("eval/0", num=2)
    kept, lost = client.acquire(), client.acquire()
    while client.status().num_leases_expired == 0:
        assert client.extend(kept.lease_id) == [kept.lease_id]
    assert client.extend(kept.lease_id, lost.lease_id) == [kept.lease_id]


def test_a_lease_that_ended_with_its_result_is_not_reported_as_lost(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    client.run_episode(lease, reward=1)
    assert client.extend(lease.lease_id, "unknown-lease") == [lease.lease_id]


SHOT = b"sent but never stored"


def with_image(image: common_pb2.Image) -> rollout_pb2.StreamEpisodeRequest:
    """Return a valid step with an additional, invalid screenshot."""
    request = step(0, SHOT, sent=[SHOT])
    request.images.append(image)
    return request


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayClient]:
    """Return a client of one service that several tests share."""
    process = ReplayProcess(replay_config(tmp_path_factory.mktemp("shared")))
    yield process.client()
    process.close()


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([step(1, SHOT, sent=[SHOT])], "expected step 0"),
        ([step(0, SHOT)], "neither sent nor stored"),
        ([step(0, SHOT, sent=[SHOT]), result(1, 2)], "2 steps, but 1"),
        ([result(float("nan"), 0)], "must be finite, not nan"),
        ([rollout_pb2.StreamEpisodeRequest(result=rollout_pb2.EpisodeResult(reward=1))], "termination"),
        ([rollout_pb2.StreamEpisodeRequest(fault=rollout_pb2.EpisodeFault(message="?"))], "unknown fault kind 0"),
        ([rollout_pb2.StreamEpisodeRequest()], "empty message"),
        (
            [with_image(common_pb2.Image(hash=ids.image_hash(b"other"), data=SHOT))],
            "have another hash",
        ),
        (
            [with_image(common_pb2.Image(hash=ids.image_hash(b"large"), data=bytes(16 * 1024**2 + 1)))],
            "over the limit",
        ),
        (
            [rollout_pb2.StreamEpisodeRequest(step=rollout_pb2.EpisodeStep(index=0, payload=b"\x93pickle"))],
            "not a step",
        ),
        (
            [
                rollout_pb2.StreamEpisodeRequest(step=rollout_pb2.EpisodeStep(payload=step(4, SHOT).step.payload)),
            ],
            "payload of step 4",
        ),
    ],
)
def test_a_message_that_violates_the_protocol_is_rejected_with_its_cause(
    shared_client: ReplayClient, requests: list[rollout_pb2.StreamEpisodeRequest], words: str
) -> None:
    client = shared_client
    client.plan(f"eval/{words}", num=1)
    lease = client.acquire()
    with pytest.raises(grpc.RpcError) as rejected:
        client.stream([begin(lease), *requests])
    assert rejected.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in str(rejected.value.details())
    client.run_episode(lease, reward=1)  # the episode can be continued


def test_a_caller_with_another_protocol_version_is_rejected_with_a_hint(start_replay: StartReplay) -> None:
    client = start_replay().client()
    old = common_pb2.Peer(role="actor", name="old", protocol=0)
    for call, request in [
        (client.rollout.AcquireLease, rollout_pb2.AcquireLeaseRequest(peer=old, request_id="r")),
        (client.rollout.ExtendLeases, rollout_pb2.ExtendLeasesRequest(peer=old)),
        (client.replay.PlanGroups, replay_pb2.PlanGroupsRequest(peer=old)),
        (client.replay.TakeGroup, replay_pb2.TakeGroupRequest(peer=old, queue="train", batch_id="b")),
    ]:
        with pytest.raises(grpc.RpcError) as rejected:
            call(request, timeout=60)
        assert rejected.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "install the same version" in str(rejected.value.details())
    begin_old = rollout_pb2.StreamEpisodeRequest(begin=rollout_pb2.EpisodeBegin(peer=old, lease_id="l"))
    with pytest.raises(grpc.RpcError) as rejected:
        client.stream([begin_old])
    assert rejected.value.code() == grpc.StatusCode.FAILED_PRECONDITION
