"""Replay service for tests: a real process on a free loopback port, with clients."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from ports_kit import free_address

from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2, rollout_pb2_grpc

_DEADLINE_S = 60.0
TEST_PEER = rpc.peer("actor", "test-actor")

Requests = Iterable[rollout_pb2.StreamEpisodeRequest]


class ReplayClient:
    """Client of both services of one replay process."""

    def __init__(self, address: str) -> None:
        self._channel = rpc.connect_sync(address)
        self.rollout = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        self.replay = replay_pb2_grpc.ReplayServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def plan(self, group_id: str, *, task_id: str = "task", num: int = 2, scripted: bool = False) -> int:
        """Plan one group; the part of its id before the last slash is the queue."""
        group = replay_pb2.GroupPlan(
            group_id=group_id,
            queue=group_id.rpartition("/")[0],
            task_id=task_id,
            task_json=b'{"id": "task"}',
            seeds=range(num),
            max_steps=15,
            temperature=1.0,
            acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED if scripted else rollout_pb2.ACTING_POLICY_SAMPLED,
        )
        response = self.replay.PlanGroups(
            replay_pb2.PlanGroupsRequest(peer=TEST_PEER, groups=[group]), timeout=_DEADLINE_S
        )
        return int(response.num_added)

    def acquire(self, *, wait_s: float = 0.0, request_id: str = "") -> rollout_pb2.AcquireLeaseResponse:
        request = rollout_pb2.AcquireLeaseRequest(
            peer=TEST_PEER, request_id=request_id or ids.new_id("request"), wait_s=wait_s
        )
        lease: rollout_pb2.AcquireLeaseResponse = self.rollout.AcquireLease(request, timeout=wait_s + _DEADLINE_S)
        return lease

    def extend(self, *lease_ids: str) -> list[str]:
        request = rollout_pb2.ExtendLeasesRequest(peer=TEST_PEER, lease_ids=lease_ids)
        return list(self.rollout.ExtendLeases(request, timeout=_DEADLINE_S).alive)

    def report_desktops(self, num_set_aside: int, start_error: str) -> None:
        request = rollout_pb2.ExtendLeasesRequest(
            peer=TEST_PEER, num_desktops_set_aside=num_set_aside, start_error=start_error
        )
        self.rollout.ExtendLeases(request, timeout=_DEADLINE_S)

    def release(self, *lease_ids: str) -> None:
        self.rollout.ReleaseLeases(
            rollout_pb2.ReleaseLeasesRequest(peer=TEST_PEER, lease_ids=lease_ids), timeout=_DEADLINE_S
        )

    def stream(self, requests: Requests) -> list[tuple[int, bool]]:
        """Send a whole stream and return the acknowledgements."""
        responses = self.rollout.StreamEpisode(iter(requests), timeout=_DEADLINE_S)
        return [(response.acked_steps, response.closed) for response in responses]

    def run_episode(self, lease: rollout_pb2.AcquireLeaseResponse, *, reward: float, num_steps: int = 2) -> None:
        """Stream the episode of a lease with its result."""
        assert lease.lease_id, "no lease was granted"
        acks = self.stream([begin(lease), *steps(lease, range(num_steps)), result(reward, num_steps)])
        assert acks[-1] == (num_steps, True)

    def run_group(self, group_id: str, rewards: Sequence[float], **plan: Any) -> None:
        """Plan a group and run all of its episodes; no other rollout may be pending."""
        self.plan(group_id, num=len(rewards), **plan)
        for reward in rewards:
            self.run_episode(self.acquire(), reward=reward)

    def take(
        self, queue_name: str, batch_id: str, ordinal: int, *, wait_s: float = 0.0, dropped: Sequence[str] = ()
    ) -> replay_pb2.Group | None:
        request = replay_pb2.TakeGroupRequest(
            peer=TEST_PEER,
            queue=queue_name,
            batch_id=batch_id,
            ordinal=ordinal,
            wait_s=wait_s,
            dropped_group_ids=dropped,
        )
        response = self.replay.TakeGroup(request, timeout=wait_s + _DEADLINE_S)
        return response.group if response.HasField("group") else None

    def commit(self, queue_name: str, batch_id: str, *verdicts: replay_pb2.GroupVerdict) -> None:
        request = replay_pb2.CommitBatchRequest(peer=TEST_PEER, queue=queue_name, batch_id=batch_id, verdicts=verdicts)
        self.replay.CommitBatch(request, timeout=_DEADLINE_S)

    def set_updates(self, num_updates: int) -> None:
        version = common_pb2.PolicyVersion(lineage="test", step=num_updates)
        request = replay_pb2.SetPolicyVersionRequest(version=version, num_updates=num_updates)
        self.replay.SetPolicyVersion(request, timeout=_DEADLINE_S)

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        request = replay_pb2.GetReplayStatusRequest()
        status: replay_pb2.GetReplayStatusResponse = self.replay.GetReplayStatus(request, timeout=_DEADLINE_S)
        return status

    def queue_status(self, name: str) -> replay_pb2.QueueStatus:
        return next(queue for queue in self.status().queues if queue.queue == name)

    def fetch(self, hashes: Iterable[str]) -> list[bytes]:
        request = replay_pb2.FetchImagesRequest(hashes=hashes)
        return [response.image.data for response in self.replay.FetchImages(request, timeout=_DEADLINE_S)]

    def episodes(self, **query: Any) -> list[replay_pb2.Episode]:
        request = replay_pb2.ListEpisodesRequest(**query)
        return [response.episode for response in self.replay.ListEpisodes(request, timeout=_DEADLINE_S)]


class ReplayProcess:
    """Replay service of one run, which can be killed and restarted on the same run directory."""

    def __init__(self, config: RunConfig, prefix: Sequence[str] = ()) -> None:
        """Start the service.

        Args:
            config: configuration of the run.
            prefix: command that runs the rest of its command line.
        """
        self._prefix = prefix
        self.config = config
        self.folder = config.run_dir / "replay"
        self._config_path = config.run_dir / "config.json"
        self._log = config.run_dir / "replay.log"
        self._clients: list[ReplayClient] = []
        config.run_dir.mkdir(parents=True, exist_ok=True)
        dump_config(config, self._config_path)
        self.start()

    def start(self) -> None:
        command = [*self._prefix, sys.executable, "-m", "deskrl.cli.main", "replay", str(self._config_path)]
        with open(self._log, "w") as log:  # a pipe that is not read would block the service
            self.process = subprocess.Popen(command, stderr=log)
        with rpc.connect_sync(self.config.replay.address) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=_DEADLINE_S)
            except grpc.FutureTimeoutError:
                status = self.process.poll()
                raise AssertionError(f"replay is not ready, status {status}: {self._log.read_text()[-3000:]}") from None

    def client(self) -> ReplayClient:
        client = ReplayClient(self.config.replay.address)
        self._clients.append(client)
        return client

    def kill(self) -> None:
        """Kill the service with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> tuple[int, str]:
        """Stop the service with SIGTERM and return its exit status and its log."""
        self.process.terminate()
        return self.process.wait(_DEADLINE_S), self._log.read_text()

    def wait_for_log(self, text: str) -> None:
        """Wait until the log contains `text`."""
        deadline_s = time.monotonic() + _DEADLINE_S
        while text not in self._log.read_text():
            assert time.monotonic() < deadline_s, f"{text!r} is not in the log"
            time.sleep(0.02)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.stop()


class OpenStream:
    """Stream of an episode that a test sends message by message."""

    def __init__(self, client: ReplayClient) -> None:
        self._requests: queue.SimpleQueue[rollout_pb2.StreamEpisodeRequest | None] = queue.SimpleQueue()
        self._call = client.rollout.StreamEpisode(iter(self._requests.get, None), timeout=_DEADLINE_S)

    def send(self, *requests: rollout_pb2.StreamEpisodeRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def read_until(self, acked_steps: int) -> None:
        """Read acknowledgements until `acked_steps` steps are on disk."""
        for response in self._call:
            if response.acked_steps >= acked_steps:
                return
        raise AssertionError(f"the stream ended before step {acked_steps} was acknowledged")

    def read_code(self) -> grpc.StatusCode:
        """Read the stream to its end and return its status."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        self._requests.put(None)
        code: grpc.StatusCode = self._call.code()
        return code

    def break_off(self) -> None:
        """Cancel the call, as if the connection were lost."""
        self._call.cancel()
        self._requests.put(None)


def screenshot(lease: rollout_pb2.AcquireLeaseResponse, index: int, num_bytes: int = 300) -> bytes:
    """Return arbitrary bytes as a screenshot; replay does not decode screenshots."""
    return (f"{lease.rollout.episode_id}:{index};".encode() * num_bytes)[:num_bytes]


def begin(lease: rollout_pb2.AcquireLeaseResponse) -> rollout_pb2.StreamEpisodeRequest:
    return rollout_pb2.StreamEpisodeRequest(
        begin=rollout_pb2.EpisodeBegin(peer=TEST_PEER, lease_id=lease.lease_id, episode_id=lease.rollout.episode_id)
    )


def image(data: bytes) -> common_pb2.Image:
    return common_pb2.Image(hash=ids.image_hash(data), data=data)


def step(index: int, shot: bytes, sent: Iterable[bytes] = ()) -> rollout_pb2.StreamEpisodeRequest:
    """Return a step with one screenshot, and the screenshots that are sent with it."""
    name = ids.image_hash(shot)
    content = Step(
        index=index,
        screenshot=name,
        images=(name,),
        text=f"action {index}",
        prompt_ids=(1, 2, 3),
        action_ids=(4, 5),
        logprobs=(-0.5, -0.25),
        spans=(VersionSpan("test", 7, 0, 2),),
    )
    return rollout_pb2.StreamEpisodeRequest(
        step=rollout_pb2.EpisodeStep(index=index, image_hashes=[name], payload=encode_step(content)),
        images=[image(data) for data in sent],
    )


def steps(
    lease: rollout_pb2.AcquireLeaseResponse, indices: Iterable[int], num_bytes: int = 300
) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    """Return each step with its screenshot."""
    for index in indices:
        shot = screenshot(lease, index, num_bytes)
        yield step(index, shot, sent=[shot])


def result(reward: float, num_steps: int) -> rollout_pb2.StreamEpisodeRequest:
    return rollout_pb2.StreamEpisodeRequest(
        result=rollout_pb2.EpisodeResult(
            reward=reward, format_ok=True, termination=rollout_pb2.TERMINATION_FINISHED, num_steps=num_steps
        )
    )


def fault(
    message: str = "the desktop died", kind: rollout_pb2.FaultKind = rollout_pb2.FAULT_KIND_DESKTOP_LOST
) -> rollout_pb2.StreamEpisodeRequest:
    return rollout_pb2.StreamEpisodeRequest(fault=rollout_pb2.EpisodeFault(kind=kind, message=message))


StartReplay = Callable[..., ReplayProcess]


@pytest.fixture
def start_replay(tmp_path: Path) -> Iterator[StartReplay]:
    """Return a function that starts a replay service on a new run; it takes the keywords of `replay_config`."""
    processes: list[ReplayProcess] = []

    def start(**settings: Any) -> ReplayProcess:
        processes.append(ReplayProcess(replay_config(tmp_path / f"run-{len(processes)}", **settings)))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def replay_config(
    runs: Path,
    *,
    staleness: int = 4,
    rollouts: int = 2,
    groups_per_batch: int = 1,
    security: Path | None = None,
    grpo: Mapping[str, Any] | None = None,
    **replay: Any,
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        runs: directory of runs.
        staleness: maximum staleness in policy versions.
        rollouts: rollouts per group.
        groups_per_batch: groups per batch.
        security: directory of certificates; None disables authentication.
        grpo: further values of table `learner.grpo`.
        replay: values of table `replay`.
    """
    return RunConfig.model_validate(
        {
            "runs": runs,
            "tasks": {"num_rollouts": rollouts},
            "replay": {"address": free_address(), **replay},
            "inference": {"address": free_address()},  # no server listens there, even if the default port is in use
            "security": {"certificates_dir": security},
            "learner": {"grpo": {"groups_per_batch": groups_per_batch, "max_staleness": staleness, **(grpo or {})}},
        }
    )
