"""Groups over gRPC: rate limited, taken in order of completion, delivered again until committed, dropped, removed."""

from __future__ import annotations

import grpc
import pytest
from replay_kit import TEST_PEER, ReplayClient, StartReplay, begin, fault, result, steps

from deskrl.learner.episode_types import decode_group
from deskrl.learner.metrics.metric_records import count_successes
from deskrl.proto.v1 import replay_pb2, rollout_pb2


def verdict(group: str, dropped: str = "", *, used: bool = False) -> replay_pb2.GroupVerdict:
    return replay_pb2.GroupVerdict(group_id=group, dropped_because=dropped, used_candidate=used)


def members(group: replay_pb2.Group | None) -> list[str]:
    assert group is not None
    return [episode.episode_id for episode in group.episodes]


def status_code(rejected: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    code: grpc.StatusCode = rejected.value.code()
    return code


def test_planning_twice_plans_once(start_replay: StartReplay) -> None:
    client = start_replay().client()
    assert client.plan("train/0") == 1
    assert client.plan("train/0", task_id="another") == 0
    assert client.queue_status("train").num_planned == 2
    assert client.acquire().rollout.task_id == "task"


def test_an_incomplete_or_too_large_plan_is_rejected(start_replay: StartReplay) -> None:
    client = start_replay(rollouts=4).client()
    for group_id, num, words in [("train/0", 5, "tasks.num_rollouts"), ("eval/0", 0, "seeds")]:
        with pytest.raises(grpc.RpcError) as rejected:
            client.plan(group_id, num=num)
        assert status_code(rejected) == grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(rejected.value.details())


def test_unlimited_queues_come_first_then_started_groups_then_plan_order(
    start_replay: StartReplay,
) -> None:
    client = start_replay().client()
    for group in ("train/0", "train/1", "demo/0"):
        client.plan(group)
    first = client.acquire()
    assert first.rollout.episode_id == "demo/0.0"
    assert [client.acquire().rollout.episode_id for _ in range(3)] == ["demo/0.1", "train/0.0", "train/0.1"]
    last = client.acquire()
    assert last.rollout.episode_id == "train/1.0"
    client.plan("demo/1")
    client.release(first.lease_id)
    assert client.acquire().rollout.episode_id == "demo/0.0", "its group has started, demo/1 has not"


def test_groups_are_taken_in_order_of_completion(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.plan("train/0")
    client.plan("train/1")
    leases = [client.acquire() for _ in range(4)]
    for lease in (leases[0], leases[2], leases[3]):
        client.run_episode(lease, reward=1)
    assert members(client.take("train", "batch", 0)) == ["train/1.0", "train/1.1"]
    assert client.take("train", "batch", 1) is None
    client.run_episode(leases[1], reward=0)
    assert members(client.take("train", "batch", 1)) == ["train/0.0", "train/0.1"]


def test_the_slots_of_a_batch_are_filled_in_order_even_if_a_later_one_is_requested_first(
    start_replay: StartReplay,
) -> None:
    client = start_replay().client()
    for group in ("train/0", "train/1"):
        client.run_group(group, [0, 1])
    assert client.take("train", "batch", 1) is None
    request = replay_pb2.TakeGroupRequest(peer=TEST_PEER, queue="train", batch_id="batch", ordinal=1, wait_s=10)
    requested_early = client.replay.TakeGroup.future(request, timeout=60)
    assert members(client.take("train", "batch", 0)) == ["train/0.0", "train/0.1"]
    assert members(requested_early.result().group) == ["train/1.0", "train/1.1"]


def test_taking_waits_for_a_group_to_complete(start_replay: StartReplay) -> None:
    client = start_replay().client()
    request = replay_pb2.TakeGroupRequest(peer=TEST_PEER, queue="train", batch_id="b", wait_s=20)
    waiting = client.replay.TakeGroup.future(request, timeout=60)
    client.run_group("train/0", [0, 1])
    assert members(waiting.result().group) == ["train/0.0", "train/0.1"]


def test_rollouts_stay_within_the_rate_limit(start_replay: StartReplay) -> None:
    """S = 1, batches of 2 groups of 2: (1 + 1 + version) * 4 - consumed episodes may be running or unused."""
    client = start_replay(staleness=1, rollouts=2, groups_per_batch=2).client()
    for ordinal in range(10):
        client.plan(f"train/{ordinal}")

    def run_all_granted() -> int:
        num = 0
        while (lease := client.acquire()).lease_id:
            client.run_episode(lease, reward=num % 2)
            num += 1
        return num

    assert run_all_granted() == 8
    for ordinal in range(2):
        client.take("train", "batch-0", ordinal)
    assert run_all_granted() == 0, "a group bound to a batch is consumed, and counts until the version increases"
    client.set_updates(1)
    assert run_all_granted() == 4
    client.commit("train", "batch-0", verdict("train/0"), verdict("train/1"))
    assert run_all_granted() == 0, "the commit does not change the limit"


def test_a_group_with_fewer_rollouts_counts_as_a_whole_one(start_replay: StartReplay) -> None:
    """Otherwise more groups would run ahead than the staleness limit allows."""
    client = start_replay(staleness=0, rollouts=4, groups_per_batch=1).client()
    for ordinal in range(3):
        client.plan(f"train/{ordinal}", num=2)
    for _ in range(2):
        client.run_episode(client.acquire(), reward=1)
    assert not client.acquire().lease_id
    assert members(client.take("train", "batch", 0)) == ["train/0.0", "train/0.1"]
    assert not client.acquire().lease_id
    client.commit("train", "batch", verdict("train/0"))
    client.set_updates(1)
    assert client.acquire().rollout.group_id == "train/1"


def test_a_dropped_group_makes_room_for_another_before_its_batch_is_committed(start_replay: StartReplay) -> None:
    """Otherwise, with S = 0 and one group per batch, a learner would wait for ever after a zero-variance group."""
    client = start_replay(staleness=0, rollouts=2, groups_per_batch=1).client()
    for ordinal in range(4):
        client.plan(f"train/{ordinal}")
    for _ in range(2):
        client.run_episode(client.acquire(), reward=0)
    assert not client.acquire().lease_id
    assert client.take("train", "batch", 0) is not None
    assert not client.acquire().lease_id, "it may still be trained on"
    for _ in range(2):  # a repeated report has no effect
        assert client.take("train", "batch", 1, dropped=["train/0"]) is None
    for reward in (0, 1):
        client.run_episode(client.acquire(), reward=reward)
    assert not client.acquire().lease_id
    assert members(client.take("train", "batch", 1, dropped=["train/0"])) == ["train/1.0", "train/1.1"]
    client.commit("train", "batch", verdict("train/0", "all_failed"), verdict("train/1"))
    client.set_updates(1)
    assert client.acquire().rollout.group_id == "train/2"
    assert client.acquire().rollout.group_id == "train/2"
    assert not client.acquire().lease_id, (
        "one batch was trained on, so one batch may run: the dropped group is not counted twice"
    )
    assert dict(client.status().dropped) == {"all_failed": 1}


def test_a_group_dropped_only_in_its_verdict_makes_room_too(start_replay: StartReplay) -> None:
    client = start_replay(staleness=0).client()
    client.plan("train/0")
    client.plan("train/1")
    for _ in range(2):
        client.run_episode(client.acquire(), reward=0)
    client.take("train", "batch", 0)
    client.commit("train", "batch", verdict("train/0", "stale"))
    assert client.acquire().rollout.group_id == "train/1"


def test_a_group_with_a_faulted_member_is_delivered_with_the_others(start_replay: StartReplay) -> None:
    client = start_replay(rollouts=3, max_faults=0).client()
    client.plan("train/0", num=3)
    client.run_episode(client.acquire(), reward=1)
    lease = client.acquire()
    client.stream([begin(lease), fault()])
    client.run_episode(client.acquire(), reward=0)
    group = client.take("train", "batch", 0)
    assert members(group) == ["train/0.0", "train/0.2"]
    assert group is not None and group.num_faulted == 1


def test_a_group_with_too_few_members_is_closed_on_train_and_delivered_on_other_queues(
    start_replay: StartReplay,
) -> None:
    client = start_replay(max_faults=0, staleness=0).client()
    for group in ("eval/0", "train/0", "train/1"):
        client.plan(group)
        lease = client.acquire()
        client.stream([begin(lease), fault()])
        lease = client.acquire()
        if group == "train/0":
            client.run_episode(lease, reward=1)
        else:
            client.stream([begin(lease), fault()])
    assert client.take("train", "batch", 0) is None
    assert dict(client.status().dropped) == {"faults": 2}
    nothing = client.take("eval", "batch", 0)
    assert nothing is not None and (len(nothing.episodes), nothing.num_faulted) == (0, 2)
    client.plan("train/2")
    assert client.acquire().lease_id, "closed groups do not count"


def test_a_failed_group_is_offered_a_success_of_an_earlier_group_of_its_task(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.run_group("train/0", [0, 1])
    client.run_group("train/1", [0, 0.1])
    client.run_group("train/2", [0, 0], task_id="another")
    mixed, failed, other = (client.take("train", "batch", ordinal) for ordinal in range(3))
    assert mixed is not None and not mixed.HasField("candidate"), "a success is not offered to its own group"
    assert failed is not None and failed.candidate == mixed.episodes[1], "0.1 is not above 0.1"
    assert other is not None and not other.HasField("candidate"), "a success is offered to its own task only"

    verdicts = [verdict("train/0"), verdict("train/1", used=True), verdict("train/2", "all_failed")]
    for _ in range(2):
        client.commit("train", "batch", *verdicts)
    (success,) = client.status().successes
    assert (success.task_id, success.num_stored, success.num_used) == ("task", 1, 1)
    assert (success.newest_version.lineage, success.newest_version.step) == ("test", 7)


@pytest.mark.parametrize("replay", [{}, {"success_threshold": 0.3}], ids=["default threshold", "threshold 0.3"])
def test_replay_and_learner_agree_that_a_reward_of_exactly_the_threshold_is_a_failure(
    start_replay: StartReplay, replay: dict[str, float]
) -> None:
    """Both read the reward as a 32-bit float, in which 0.1 and 0.3 exceed the 64-bit numbers of the configuration."""
    process = start_replay(rollouts=3, **replay)
    threshold = process.config.replay.success_threshold
    client = process.client()
    client.run_group("train/0", [threshold, threshold + 1e-12, threshold + 0.01])
    group = client.take("train", "batch", 0)
    assert group is not None
    counts = count_successes(decode_group(group).members, threshold)
    assert counts["task"]["success"] == client.queue_status("train").num_succeeded == 1
    (stored,) = client.status().successes
    assert stored.num_stored == 1


def test_only_successes_of_the_policy_on_queue_train_are_stored(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.run_group("demo/0", [1, 1], scripted=True)
    client.run_group("eval/0", [1, 1])
    client.run_group("train/0", [1, 1], scripted=True)
    for name in ("demo", "eval", "train"):
        client.take(name, "batch", 0)
    assert not client.status().successes


def test_the_oldest_success_of_a_task_is_evicted(start_replay: StartReplay) -> None:
    client = start_replay(successes_per_task=2, staleness=9).client()
    client.run_group("train/0", [0, 1])
    client.run_group("train/1", [1, 1])
    for ordinal in range(2, 6):
        client.run_group(f"train/{ordinal}", [0, 0])
    groups = [client.take("train", "batch", ordinal) for ordinal in range(6)]
    offered = {group.candidate.episode_id for group in groups if group is not None and group.HasField("candidate")}
    assert offered <= {"train/1.0", "train/1.1"} and offered
    assert client.status().successes[0].num_stored == 2


def test_without_the_success_buffer_no_success_is_stored_or_offered(start_replay: StartReplay) -> None:
    client = start_replay(staleness=9, grpo={"use_success_buffer": False}).client()
    client.run_group("train/0", [1, 1])
    client.run_group("train/1", [0, 0])
    groups = [client.take("train", "batch", ordinal) for ordinal in range(2)]
    assert not any(group is not None and group.HasField("candidate") for group in groups)
    assert not client.status().successes


def test_the_rule_of_arpo_also_offers_a_success_to_a_group_with_small_rewards(start_replay: StartReplay) -> None:
    """Rewards of 0.12 and 0.15 are stored as successes, although their group failed."""
    for when, offered in (("all_failed", False), ("low_mean_low_std", True)):
        client = start_replay(staleness=9, success_sampling="newest", grpo={"replace_when": when}).client()
        client.run_group("train/0", [0, 1])
        client.run_group("train/1", [0.12, 0.15])
        groups = [client.take("train", "batch", ordinal) for ordinal in range(2)]
        assert groups[1] is not None and groups[1].HasField("candidate") is offered
        assert not offered or groups[1].candidate.episode_id == "train/0.1", "a success is not offered to its own group"


def test_a_batch_is_delivered_again_unchanged_until_it_is_committed(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [1, 1])
    client.run_group("train/1", [0, 0])
    first = [client.take("train", "batch", ordinal) for ordinal in range(2)]
    assert [client.take("train", "batch", ordinal) for ordinal in range(2)] == first
    process.kill()
    process.start()
    client.run_group("train/2", [1, 1])
    assert [client.take("train", "batch", ordinal) for ordinal in range(2)] == first, "the candidate is the same too"
    assert members(client.take("train", "another", 0)) == ["train/2.0", "train/2.1"]

    for _ in range(2):
        client.commit("train", "batch", verdict("train/0", "all_succeeded"), verdict("train/1", "all_failed"))
    assert client.queue_status("train").num_consumed == 4
    assert dict(client.status().dropped) == {"all_succeeded": 1, "all_failed": 1}
    with pytest.raises(grpc.RpcError) as rejected:
        client.take("train", "batch", 2)
    assert status_code(rejected) == grpc.StatusCode.FAILED_PRECONDITION


def test_a_commit_with_an_invalid_verdict_is_rejected_as_a_whole(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.run_group("train/0", [0, 0])
    client.take("train", "batch", 0)
    for bad in (verdict("train/9"), verdict("train/0", used=True)):
        with pytest.raises(grpc.RpcError) as rejected:
            client.commit("train", "batch", bad)
        assert status_code(rejected) == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as rejected:
        client.commit("train", "unheard-of")
    assert status_code(rejected) == grpc.StatusCode.NOT_FOUND
    assert client.queue_status("train").num_consumed == 0


def test_episodes_are_found_newest_first_by_queue_task_and_reward(start_replay: StartReplay) -> None:
    client = start_replay().client()
    client.run_group("train/0", [0, 1])
    client.run_group("eval/0", [0.5, 1], task_id="another")

    def found(**query: object) -> list[str]:
        return [episode.episode_id for episode in client.episodes(**query)]

    assert found() == ["eval/0.1", "eval/0.0", "train/0.1", "train/0.0"]
    assert found(limit=1) == ["eval/0.1"]
    assert found(queue="train") == ["train/0.1", "train/0.0"]
    assert found(task_id="another", max_reward=0.9) == ["eval/0.0"]
    assert found(min_reward=1) == ["eval/0.1", "train/0.1"]
    (envelope,) = client.episodes(episode_ids=["train/0.1"], envelope_only=True)
    assert not envelope.steps and envelope.result.reward == 1


def test_the_error_for_a_screenshot_that_is_not_stored_names_it(start_replay: StartReplay) -> None:
    client = start_replay().client()
    with pytest.raises(grpc.RpcError) as rejected:
        client.fetch(["ab" * 32])
    assert status_code(rejected) == grpc.StatusCode.NOT_FOUND
    assert "ab" * 32 in str(rejected.value.details())


SHOT_BYTES = 400_000


def run_big_group(client: ReplayClient, group: str, rewards: tuple[float, float]) -> None:
    client.plan(group)
    for reward in rewards:
        lease = client.acquire()
        client.stream([begin(lease), *steps(lease, range(2), SHOT_BYTES), result(reward, 2)])


def test_a_store_over_its_size_removes_the_oldest_consumed_episodes_only(start_replay: StartReplay) -> None:
    """Each group has 1.6 MB of screenshots."""
    client = start_replay(max_bytes=8_000_000, staleness=20, successes_per_task=1).client()
    run_big_group(client, "train/0", (0, 1))  # its success stays in the success buffer
    run_big_group(client, "train/1", (0, 0))  # is offered that success
    run_big_group(client, "train/2", (0, 0))  # bound, not committed
    for batch, ordinal in (("old", 0), ("old", 1), ("pending", 0)):
        assert client.take("train", batch, ordinal) is not None
    pending = client.take("train", "pending", 0)
    client.commit("train", "old")
    for ordinal in range(3, 9):
        run_big_group(client, f"train/{ordinal}", (0, 0))

    kept = {episode.episode_id for episode in client.episodes()}
    assert not {"train/0.0", "train/1.0", "train/1.1"} & kept, "consumed and oldest"
    assert {"train/0.1", "train/2.0", "train/2.1"} <= kept, "in the success buffer, or bound"
    assert {f"train/{ordinal}.{member}" for ordinal in range(3, 9) for member in (0, 1)} <= kept, "not consumed"
    assert client.take("train", "pending", 0) == pending
    assert len(client.episodes(envelope_only=True)) == 18, "envelopes are kept"
    assert client.queue_status("train").num_finished == 18
    status = client.status()
    assert status.num_images == len(kept) * 2
    with pytest.raises(grpc.RpcError) as rejected:
        client.take("train", "old", 0)
    assert status_code(rejected) == grpc.StatusCode.FAILED_PRECONDITION


def test_screenshots_of_a_removed_episode_stay_while_another_episode_uses_them(start_replay: StartReplay) -> None:
    client = start_replay(max_bytes=1).client()
    client.plan("eval/0", num=1)
    client.plan("eval/1", num=1)
    old, new = client.acquire(), client.acquire()
    client.stream([begin(old), *steps(old, range(1)), result(1, 1)])
    shared = [*steps(old, range(1))]
    client.stream([begin(new), *shared, result(1, 1)])
    client.take("eval", "batch", 0)
    client.commit("eval", "batch")
    assert [episode.episode_id for episode in client.episodes()] == ["eval/1.0"]
    assert client.status().num_images == 1


def test_a_lease_request_without_a_request_id_is_rejected(start_replay: StartReplay) -> None:
    client = start_replay().client()
    with pytest.raises(grpc.RpcError) as rejected:
        client.rollout.AcquireLease(rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER), timeout=60)
    assert status_code(rejected) == grpc.StatusCode.INVALID_ARGUMENT
