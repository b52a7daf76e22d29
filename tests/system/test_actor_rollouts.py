"""The actor process with real desktops and a real replay service, which is a process of its own.

Inference is a double: a gRPC server with scripted responses, so that a test controls what the policy does and when a
failure happens. `Act` of the real engine is tested in test_inference_replica.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from ports_kit import free_port, free_ports
from remote_guest_kit import serving_guest
from target_game import KEY_OF_QUARTER, KEYS, TARGET_ID, quarter_of

from deskrl.actor.desktops.orphan_cleanup import find_sandbox_processes
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE, load_tasks
from deskrl.core import rpc
from deskrl.core.ids import derive_seed, image_hash
from deskrl.core.latency_breakdown import PARTS
from deskrl.core.process_lifecycle import supervised_environment
from deskrl.core.step_codec import Step, VersionSpan, decode_step
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc, rollout_pb2

BOARD = Path(__file__).parents[2] / "examples" / "desktop"
KIT = Path(__file__).parents[1] / "kit"
TASK = "make-a-folder"
MAKE_THE_FOLDER = (
    "Thought: Write the command.\nAction: type(content='mkdir amber')",
    "Thought: Run it.\nAction: hotkey(key='enter')",
    "Thought: The folder is made.\nAction: finished()",
)
KILL_ALL_PROCESSES = "Thought: Enough of this.\nAction: type(content='kill -9 -1\\n')"
INVALID_ACTION = "Thought: Hm.\nAction: frobnicate()"
TIMEOUT_S = 60.0


class PolicyDouble(inference_pb2_grpc.InferenceServiceServicer):
    """Replica with scripted responses, whose token ids are the bytes of the text.

    Args:
        responses: response at each step of an episode.
        before: called with the index of the step before each response.
        forgets: do not cache screenshots between requests.
    """

    def __init__(
        self, responses: Sequence[str], before: Callable[[int], Any] = lambda step: None, forgets: bool = False
    ) -> None:
        self._responses = responses
        self._before = before
        self._forgets = forgets
        self._images: dict[str, bytes] = {}
        self.requests: list[inference_pb2.ActRequest] = []
        self.actions: list[inference_pb2.SampledAction] = []

    def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        """Return the scripted action, or the hashes of missing screenshots."""
        self.requests.append(request)
        if self._forgets:
            self._images.clear()
        self._images |= {image.hash: image.data for image in request.images}
        contents = [content for message in request.messages for content in message.contents]
        named = [content.image_hash for content in contents if content.WhichOneof("kind") == "image_hash"]
        if missing := [name for name in named if name not in self._images]:
            return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=missing))
        step = sum(content.WhichOneof("kind") == "token_ids" for content in contents)
        self._before(step)
        action = _sampled_action(self._responses[step])
        self.actions.append(action)
        return inference_pb2.ActResponse(action=action)


def _sampled_action(text: str) -> inference_pb2.SampledAction:
    ids = list(text.encode())
    half = len(ids) // 2
    versions = [
        common_pb2.VersionSpan(version=common_pb2.PolicyVersion(lineage="a", step=step), start=start, end=end)
        for step, start, end in ((3, 0, half), (4, half, len(ids)))
    ]
    return inference_pb2.SampledAction(
        prompt_ids=[7, 8, 9],
        action_ids=ids,
        logprobs=[-0.5] * len(ids),
        versions=versions,
        text=text,
        processor_hash="processor",
        stopped=True,
        queue_ms=1.0,
        prefill_ms=2.0,
        decode_ms=3.0,
    )


@dataclass
class Run:
    """Processes of one run, and the learner's calls to its replay service."""

    folder: Path
    temporary: Path
    replay_address: str
    inference_port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    servers: list[grpc.Server] = field(default_factory=list)

    def start(self, role: str, **options: object) -> subprocess.Popen[bytes]:
        """Start `deskrl ROLE` with options such as `desktop__num_envs=2`."""
        config = self.folder / "run.toml"
        overrides = [f"--{key.replace('__', '.')}={value}" for key, value in options.items()]
        with open(self.folder / f"{role}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deskrl.cli.main", role, str(config), *overrides],
                stdout=log,
                stderr=log,
                env={**os.environ, **supervised_environment(), "TMPDIR": str(self.temporary)},
                start_new_session=True,
            )
        self.processes.append(process)
        if role == "replay":
            until(lambda: rpc.is_healthy(self.replay_address))
        return process

    def serve(self, policy: PolicyDouble, replica: int = 0) -> PolicyDouble:
        """Serve a double as a replica of the policy."""
        server = grpc.server(futures.ThreadPoolExecutor(8))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(policy, server)
        server.add_insecure_port(f"127.0.0.1:{self.inference_port + replica}")
        server.start()
        self.servers.append(server)
        return policy

    def plan(
        self,
        queue: str,
        acting: rollout_pb2.ActingPolicy,
        num_rollouts: int = 1,
        tasks: Sequence[str] = (TASK,),
        task_json: bytes | None = None,
    ) -> None:
        """Plan one group per task, with another definition of the task if `task_json` is given."""
        groups = [
            replay_pb2.GroupPlan(
                group_id=f"{queue}/{task.id}",
                queue=queue,
                task_id=task.id,
                task_json=task_json or task.data,
                seeds=range(num_rollouts),
                max_steps=6,
                temperature=0.75,
                acting_policy=acting,
            )
            for task in load_tasks(ids=tasks)
        ]
        with self._replay() as replay:
            replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "test"), groups=groups))

    def take(self, queue: str, ordinal: int = 0) -> replay_pb2.Group:
        """Wait for a complete group and return it."""
        request = replay_pb2.TakeGroupRequest(
            peer=rpc.peer("learner", "test"), queue=queue, batch_id="batch", ordinal=ordinal, wait_s=TIMEOUT_S
        )
        with self._replay() as replay:
            response: replay_pb2.TakeGroupResponse = replay.TakeGroup(request, timeout=2 * TIMEOUT_S)
        assert response.HasField("group"), self.log("actor")
        return response.group

    def episode(self, queue: str) -> tuple[replay_pb2.Episode, list[Step]]:
        """Wait for the only episode of a queue and return it with its steps."""
        (episode,) = self.take(queue).episodes
        return episode, [decode_step(data) for data in episode.steps]

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Return the counters of the replay service."""
        with self._replay() as replay:
            status: replay_pb2.GetReplayStatusResponse = replay.GetReplayStatus(replay_pb2.GetReplayStatusRequest())
            return status

    def fetch_images(self, hashes: Sequence[str]) -> dict[str, bytes]:
        """Return screenshots by hash."""
        with self._replay() as replay:
            responses = replay.FetchImages(replay_pb2.FetchImagesRequest(hashes=hashes))
            return {response.image.hash: response.image.data for response in responses}

    def desktops(self) -> list[Path]:
        """Return the directories of the run's desktops."""
        return list(self.temporary.glob("deskrl-desktops-*/*"))

    def log(self, role: str) -> str:
        """Return the log of a role."""
        return (self.folder / f"{role}.log").read_text()

    @contextlib.contextmanager
    def _replay(self) -> Iterator[replay_pb2_grpc.ReplayServiceStub]:
        with rpc.connect_sync(self.replay_address) as channel:
            yield replay_pb2_grpc.ReplayServiceStub(channel)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run with a replay service. Afterwards all processes are terminated; nothing may remain of the desktops."""
    for program in ("Xvfb", "bwrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: desktops cannot be started")
    replay_port, inference_port, _ = free_ports(3)  # the third one is for a second replica
    temporary = Path(tempfile.mkdtemp(prefix="deskrl-"))  # short, because the paths of Unix sockets are limited
    new_run = Run(tmp_path, temporary, f"127.0.0.1:{replay_port}", inference_port)
    (tmp_path / "run.toml").write_text(
        f"""
        name = "test"
        runs = "{tmp_path}"
        [desktop]
        num_envs = 1
        [agent]
        prompt = "brief"
        image_width = 504
        image_height = 280
        window_images = 2
        [replay]
        address = "{new_run.replay_address}"
        [inference]
        address = "127.0.0.1:{inference_port}"
        """
    )
    (tmp_path / "test").mkdir()
    new_run.start("replay")
    yield new_run
    for process in reversed(new_run.processes):
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.wait(TIMEOUT_S)
    for server in new_run.servers:
        server.stop(None)
    left = list(temporary.iterdir())
    shutil.rmtree(temporary)
    assert left == []
    for log in tmp_path.glob("*.log"):
        assert "Traceback" not in log.read_text() and "never retrieved" not in log.read_text(), log.read_text()


def until(condition: Callable[[], object]) -> None:
    """Poll a condition until it is true."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not become true in time"
        time.sleep(0.05)


def once(do: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls `do` on its first call only."""
    pending = [do]

    def call_once() -> None:
        if pending:
            pending.pop()()

    return call_once


def test_scripted_rollouts_become_demonstrations(run: Run) -> None:
    tasks = (TASK, "fill-the-disc")
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED, num_rollouts=2, tasks=tasks)
    metrics_port = free_port()
    run.start("actor", desktop__num_envs=2, actor__metrics_port=metrics_port)
    groups = {group.task_id: group for group in (run.take("demo", ordinal) for ordinal in range(len(tasks)))}
    assert groups.keys() == set(tasks)
    for group in groups.values():
        assert len(group.episodes) == 2 and group.num_faulted == 0
        for episode in group.episodes:
            assert_demonstration(run, episode)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
        metrics = page.read().decode()
    assert 'deskrl_actor_episodes_total{termination="finished"} 4.0' in metrics
    assert 'deskrl_actor_desktops{state="idle"}' in metrics


def test_rollouts_run_on_desktops_of_a_provider_outside_deskrl(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BOARD))
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED, task_json=next(BOARD.glob("tasks/*/*/*.json")).read_bytes())
    run.start("actor", desktop__provider="drawing_board:BoardProvider")
    episode, steps = run.episode("demo")
    assert (episode.result.reward, len(steps)) == (1.0, 5)


def start_actor_with_environments(run: Run, monkeypatch: pytest.MonkeyPatch, fault: str = "") -> None:
    """Start an actor whose desktops are the target game; `fault` is that of its first step."""
    monkeypatch.setenv("PYTHONPATH", str(KIT))
    kwargs = {"fault": fault, "fault_file": str(run.folder / "fault")}
    options = {"id": TARGET_ID, "actions": KEYS, "instruction": "Hit the white square.", "kwargs": kwargs}
    provider = {"desktop__provider": "gymnasium", "desktop__provider_options": json.dumps(options)}
    run.start("actor", desktop__width=320, desktop__height=240, desktop__step_timeout_s=2, **provider)


def hit(group_seed: int) -> str:
    """Return the response that hits the target of a group."""
    key = KEY_OF_QUARTER[quarter_of(derive_seed("environment", group_seed) % 2**31)]
    return f"Thought: It is there.\nAction: hotkey(key='{key}')"


def test_whole_episodes_are_played_on_a_gymnasium_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (play,) = load_tasks(ENVIRONMENT_SUITE)
    miss = "Thought: Hm.\nAction: hotkey(key='f5')"
    policy = run.serve(PolicyDouble((miss, hit(derive_seed(f"train/{TASK}")))))
    run.plan("train", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=3, task_json=play.data)
    start_actor_with_environments(run, monkeypatch)
    group = run.take("train")
    steps = [[decode_step(data) for data in episode.steps] for episode in group.episodes]
    assert [(episode.result.reward, episode.result.num_steps) for episode in group.episodes] == [(1.0, 2)] * 3
    assert {episode.result.termination for episode in group.episodes} == {rollout_pb2.TERMINATION_FINISHED}
    assert len({of_episode[0].screenshot for of_episode in steps}) == 1, "a group has one seed"
    assert "Hit the white square." in str(policy.requests[0].messages)
    evidence = json.loads(group.episodes[0].result.evidence_json)["checks"][0]["result"]
    assert evidence == {"reward": 1.0, "return": 1.0, "end": "terminated", "num_steps": 1, "num_ignored_actions": 1}


@pytest.mark.parametrize("fault", ["raise", "kill", "hang"])
def test_a_fault_of_an_environment_has_no_reward_and_the_episode_is_granted_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (play,) = load_tasks(ENVIRONMENT_SUITE)
    run.serve(PolicyDouble((hit(0),)))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, task_json=play.data)
    start_actor_with_environments(run, monkeypatch, fault)
    episode, steps = run.episode("eval")
    assert (episode.result.reward, len(steps), episode.num_faults) == (1.0, 1, 1)
    assert dict(run.status().faults) == {"FAULT_KIND_DESKTOP_LOST": 1}
    assert "fault desktop_lost: the environment" in run.log("actor")


def test_an_actor_whose_environment_does_not_exist_ends_with_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(KIT))
    options = json.dumps({"id": "target_game:Tarket-v0", "actions": KEYS})
    actor = run.start("actor", desktop__provider="gymnasium", desktop__provider_options=options)
    assert actor.wait(TIMEOUT_S) == 2
    assert "desktop.provider_options: target_game:Tarket-v0 cannot be made: NameNotFound" in run.log("actor")


def assert_demonstration(run: Run, episode: replay_pb2.Episode) -> None:
    """Assert that an episode is a demonstration which the learner can imitate."""
    assert episode.result.reward == 1.0
    assert episode.result.termination == rollout_pb2.TERMINATION_FINISHED
    steps = [decode_step(data) for data in episode.steps]
    for step in steps:
        last = inference_pb2.ChatMessage.FromString(step.messages[-1])
        assert last.role == inference_pb2.MESSAGE_ROLE_ASSISTANT
        assert last.contents[0].text == step.text
    hashes = {step.screenshot for step in steps} | {episode.result.final_image_hash}
    images = run.fetch_images(sorted(hashes))
    assert all(image_hash(data) == name for name, data in images.items()) and images.keys() == hashes


def test_sampled_steps_contain_exactly_what_inference_reported(run: Run) -> None:
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval")
    assert (episode.result.reward, episode.result.num_steps) == (1.0, 3)
    assert len(policy.requests) == len(policy.actions) == 3
    for step, request, action in zip(steps, policy.requests, policy.actions, strict=True):
        assert step.prompt_ids == tuple(action.prompt_ids) and step.action_ids == tuple(action.action_ids)
        assert step.logprobs == tuple(action.logprobs) and step.text == action.text
        assert step.spans == tuple(
            VersionSpan(s.version.lineage, s.version.step, s.start, s.end) for s in action.versions
        )
        assert step.processor_hash == "processor" and step.temperature == 0.75 and step.messages == ()
        assert [image.hash for image in request.images] == [step.screenshot], "each screenshot is sent once"
        assert request.temperature == 0.75
    assert [len(step.images) for step in steps] == [1, 2, 2], "the context window has two screenshots"
    assert [step.action["kind"] for step in steps] == ["type", "hotkey", "finished"]
    assert steps[0].timings_ms.keys() >= set(PARTS)
    responses = [
        m.contents[0].token_ids.ids
        for m in policy.requests[2].messages
        if m.role == inference_pb2.MESSAGE_ROLE_ASSISTANT
    ]
    assert [bytes(ids).decode() for ids in responses] == list(MAKE_THE_FOLDER[:2]), (
        "earlier responses are sent as the token ids that were sampled"
    )


def test_a_replica_that_lacks_screenshots_is_sent_them_again(run: Run) -> None:
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, forgets=True))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval")
    assert episode.result.reward == 1.0
    assert len(policy.requests) > len(policy.actions) == len(steps)


def test_another_replica_is_used_if_one_is_unavailable(run: Run) -> None:
    run.serve(PolicyDouble(MAKE_THE_FOLDER), replica=1)
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=4)
    run.start("actor", inference__num_replicas=2, desktop__num_envs=2)
    group = run.take("eval")
    assert [episode.result.reward for episode in group.episodes] == [1.0] * 4
    assert not run.status().faults


def test_unavailable_inference_is_a_fault(run: Run) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor", actor__act_timeout_s=0.5, replay__max_faults=1)
    until(lambda: run.status().faults)
    assert set(run.status().faults) == {"FAULT_KIND_INFERENCE"}


def test_an_invalid_action_ends_the_episode_with_reward_0(run: Run) -> None:
    run.serve(PolicyDouble((*MAKE_THE_FOLDER[:2], INVALID_ACTION)))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, _ = run.episode("eval")
    assert (episode.result.reward, episode.result.num_steps) == (0.0, 3)
    assert episode.result.termination == rollout_pb2.TERMINATION_FORMAT_ERROR and not episode.result.format_ok


def test_a_policy_that_kills_all_its_programs_fails_and_the_next_episode_gets_a_fresh_desktop(run: Run) -> None:
    run.serve(PolicyDouble((KILL_ALL_PROCESSES, *MAKE_THE_FOLDER[1:])))
    run.plan("eval/0", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval/0")
    assert (episode.result.reward, episode.num_faults) == (0.0, 0)
    assert steps[0].action["text"] == "kill -9 -1\n"
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert run.take("demo").episodes[0].result.reward == 1.0


@pytest.mark.parametrize("command", [":(){ :|:& };:", "rm -rf --no-preserve-root / ~", "cat /dev/zero | tail"])
def test_a_destructive_command_of_the_policy_is_a_failure_and_not_a_fault(run: Run, command: str) -> None:
    destructive = f"Thought: Let it end.\nAction: type(content='{command}\\n')"
    policy = run.serve(PolicyDouble((destructive, "Thought: So.\nAction: wait()", MAKE_THE_FOLDER[-1])))
    run.plan("eval/0", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor", desktop__memory_bytes=512 * 1024**2, desktop__step_timeout_s=10)
    episode, steps = run.episode("eval/0")
    assert (episode.result.reward, episode.num_faults) == (0.0, 0)
    assert steps[0].action["text"] == f"{command}\n" and policy.actions[0].text == destructive
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert run.take("demo").episodes[0].result.reward == 1.0, "the next episode has a working desktop"


def test_a_policy_that_ends_its_x_server_destroys_its_desktop_and_the_rollout_is_not_granted_again(run: Run) -> None:
    end_x_server = "setxkbmap -option terminate:ctrl_alt_bksp; xdotool key ctrl+alt+BackSpace"
    steps = (f"Thought: Off.\nAction: type(content='{end_x_server}\\n')", "Thought: So.\nAction: wait()")
    run.serve(PolicyDouble((*steps, *MAKE_THE_FOLDER)))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, _ = run.episode("eval")
    assert episode.result.termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED
    assert (episode.result.reward, episode.num_faults, dict(run.status().faults)) == (0.0, 0, {})
    assert json.loads(episode.result.evidence_json).keys() == {"destroyed"}


def test_a_policy_that_makes_its_result_unreadable_fails_and_the_rollout_is_not_granted_again(run: Run) -> None:
    (task,) = load_tasks(ids=(TASK,))
    record = json.loads(task.data)
    record["evaluator"]["result"]["command"] = "/usr/bin/cat ~/amber"
    run.serve(PolicyDouble(("Thought: Wait for it.\nAction: type(content='mkfifo amber\\n')", MAKE_THE_FOLDER[-1])))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, task_json=json.dumps(record).encode())
    run.start("actor", desktop__evaluate_timeout_s=2)
    episode, _ = run.episode("eval")
    assert episode.result.termination == rollout_pb2.TERMINATION_STATE_UNREADABLE
    assert (episode.result.reward, episode.num_faults, dict(run.status().faults)) == (0.0, 0, {})
    assert "evaluation: not done within 2 s" in episode.result.evidence_json


@pytest.mark.parametrize("killed_before_step", [0, 1], ids=["before any action", "after an action"])
def test_a_desktop_that_is_killed_from_outside_is_a_fault(run: Run, killed_before_step: int) -> None:
    def kill_the_desktop() -> None:
        for folder in run.desktops():
            for process in find_sandbox_processes(folder):
                os.kill(process, signal.SIGKILL)

    kill_once = once(kill_the_desktop)
    run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda step: kill_once() if step == killed_before_step else None))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, _ = run.episode("eval")
    assert (episode.result.reward, episode.num_faults) == (1.0, 1)
    assert dict(run.status().faults) == {"FAULT_KIND_DESKTOP_LOST": 1}


def test_an_episode_continues_after_the_replay_service_was_killed_and_restarted(run: Run) -> None:
    def kill_replay() -> None:
        replay = run.processes[0]
        replay.kill()
        replay.wait()
        threading.Thread(target=run.start, args=("replay",)).start()

    kill_once = once(kill_replay)
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda step: kill_once() if step == 1 else None))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    until(lambda: len(run.processes) == 3 and rpc.is_healthy(run.replay_address))
    episode, steps = run.episode("eval")
    assert (episode.result.reward, len(steps), episode.num_faults) == (1.0, 3, 0)
    assert len(policy.actions) == 3, "no step was repeated"
    assert run.status().num_leases_expired == 0


def test_an_actor_that_lost_its_lease_abandons_the_episode(run: Run) -> None:
    suspend_once = once(lambda: run.processes[-1].send_signal(signal.SIGSTOP))
    replay = run.processes[0]
    replay.terminate()
    replay.wait(TIMEOUT_S)
    run.start("replay", replay__lease_ttl_s=1)
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda step: suspend_once() if step == 1 else None))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    actor = run.start("actor")
    until(lambda: run.status().num_leases_expired)
    actor.send_signal(signal.SIGCONT)
    episode, steps = run.episode("eval")
    assert (episode.result.reward, len(steps), episode.num_faults) == (1.0, 3, 0)
    assert "abandoned" in run.log("actor")
    assert len(policy.actions) > 3, "the rollout was run again from the start"


def remote_guests(*ports: int) -> dict[str, object]:
    """Return options for one desktop per port of the loopback."""
    addresses = json.dumps([f"127.0.0.1:{port}" for port in ports])
    return {"desktop__provider": "remote", "desktop__num_envs": len(ports), "desktop__remote__addresses": addresses}


def remove_locks(run: Run) -> None:
    """Remove the lock files of remote guests, which remain because another actor might be acquiring one."""
    for lock in run.temporary.glob("deskrl-desktops-*/remote-*.lock"):
        lock.unlink()
    for folder in run.temporary.glob("deskrl-desktops-*"):
        folder.rmdir()


def test_a_guest_that_does_not_start_is_set_aside_while_the_other_runs_episodes(run: Run) -> None:
    live_port, dead_port, metrics_port = free_ports(3)
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED, num_rollouts=3)
    with serving_guest() as guest:
        guest.listen(live_port)
        options = {"desktop__start_timeout_s": 2, "actor__metrics_port": metrics_port}
        actor = run.start("actor", **remote_guests(live_port, dead_port), **options)
        group = run.take("demo")
        assert [episode.result.reward for episode in group.episodes] == [1.0] * 3

        def set_aside() -> dict[int, str]:
            return {it.num_desktops_set_aside: it.start_error for it in run.status().peers if it.peer.role == "actor"}

        until(lambda: 1 in set_aside())
        assert f"the guest at 127.0.0.1:{dead_port} does not respond" in set_aside()[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
            metrics = page.read().decode()
        assert 'deskrl_actor_desktops{state="set_aside"} 1.0' in metrics
        assert "deskrl_actor_desktop_start_failures_total 0.0" not in metrics
        guest.listen(dead_port)
        until(lambda: 0 in set_aside())
        assert actor.poll() is None
        actor.terminate()
        actor.wait(TIMEOUT_S)
    remove_locks(run)


def test_an_actor_ends_if_none_of_its_desktops_starts_for_the_configured_time(run: Run) -> None:
    options = {"desktop__start_timeout_s": 0.5, "desktop__start_retry_timeout_s": 1}
    actor = run.start("actor", **remote_guests(*free_ports(2)), **options)
    assert actor.wait(TIMEOUT_S) == 1
    assert "no desktop could be started for 1 s" in run.log("actor")
    remove_locks(run)


@pytest.fixture
def num_waiting(run: Run) -> Iterator[Callable[[], int]]:
    """Serve a policy that does not respond; return a function that counts the waiting episodes."""
    waiting: list[int] = []
    end = threading.Event()

    def wait(step: int) -> None:
        waiting.append(step)
        end.wait(TIMEOUT_S)

    run.serve(PolicyDouble(MAKE_THE_FOLDER, before=wait))
    yield lambda: len(waiting)
    end.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_actor_drains_on_a_signal(run: Run, num_waiting: Callable[[], int], number: signal.Signals) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=3)
    actor = run.start("actor", desktop__num_envs=2)
    until(lambda: num_waiting() == 2)
    actor.send_signal(number)
    assert actor.wait(TIMEOUT_S) == 0
    (queue,) = run.status().queues
    assert (queue.num_planned, queue.num_leased) == (3, 0), "all leases are released"
    assert run.desktops() == []


def test_a_killed_actor_leaves_no_process_and_the_next_actor_removes_its_directories(
    run: Run, num_waiting: Callable[[], int]
) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=2)
    actor = run.start("actor", desktop__num_envs=2)
    until(lambda: num_waiting() == 2)
    left = run.desktops()
    assert len(left) == 2 and all(find_sandbox_processes(folder) for folder in left)
    actor.kill()
    actor.wait()
    until(lambda: not any(find_sandbox_processes(folder) for folder in left))
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    run.start("actor")
    assert run.take("demo").episodes[0].result.reward == 1.0
    assert not any(folder.exists() for folder in left)


def test_an_actor_index_beyond_the_number_of_actors_is_rejected(run: Run) -> None:
    command = [sys.executable, "-m", "deskrl.cli.main", "actor", str(run.folder / "run.toml"), "--index", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 2
    assert "there is no actor 1" in result.stderr and "count actors from 0" in result.stderr
