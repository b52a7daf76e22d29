"""The actor process with real desktops and a real replay service, each a process of its own.

Inference is a double: a small gRPC server that says what a test tells it to, so that a test can say exactly what the
policy does and when things break. `Act` against the real engine is tested where the engine is.
"""

from __future__ import annotations

import contextlib
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

from deskrl.actor.desktops.orphans import processes_of
from deskrl.actor.tasks.files import load_tasks
from deskrl.core import rpc
from deskrl.core.ids import image_hash
from deskrl.core.lifetime import supervised_environment
from deskrl.core.timings import PARTS
from deskrl.core.trajectory import Span, Step, decode_step
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc, rollout_pb2

TASK = "make-a-folder"
MAKE_THE_FOLDER = (
    "Thought: Write the command.\nAction: type(content='mkdir amber')",
    "Thought: Run it.\nAction: hotkey(key='enter')",
    "Thought: The folder is made.\nAction: finished()",
)
END_EVERYTHING = "Thought: Enough of this.\nAction: type(content='kill -9 -1\\n')"
NONSENSE = "Thought: Hm.\nAction: frobnicate()"
PATIENCE_S = 60.0


class PolicyDouble(inference_pb2_grpc.InferenceServiceServicer):
    """Says `words`, one each turn of an episode; its token ids are the bytes of what it says.

    Args:
        words: what is said, by the number of answers that the conversation holds already.
        before: called with that number before each answer.
        forgets: hold no screenshot from one request to the next.
    """

    def __init__(
        self, words: Sequence[str], before: Callable[[int], Any] = lambda turn: None, forgets: bool = False
    ) -> None:
        self._words = words
        self._before = before
        self._forgets = forgets
        self._images: dict[str, bytes] = {}
        self.asked: list[inference_pb2.ActRequest] = []
        self.answered: list[inference_pb2.SampledAction] = []

    def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        """Answer, or say which screenshots are missing."""
        self.asked.append(request)
        if self._forgets:
            self._images.clear()
        self._images |= {image.hash: image.data for image in request.images}
        contents = [content for message in request.messages for content in message.contents]
        named = [content.image_hash for content in contents if content.WhichOneof("kind") == "image_hash"]
        if missing := [name for name in named if name not in self._images]:
            return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=missing))
        turn = sum(content.WhichOneof("kind") == "token_ids" for content in contents)
        self._before(turn)
        action = _say(self._words[turn])
        self.answered.append(action)
        return inference_pb2.ActResponse(action=action)


def _say(text: str) -> inference_pb2.SampledAction:
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
    """One run's processes, and the learner's view of its replay service."""

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
                [sys.executable, "-m", "deskrl.core.cli", role, str(config), *overrides],
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
        """Let a double be a replica of the policy."""
        server = grpc.server(futures.ThreadPoolExecutor(8))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(policy, server)
        server.add_insecure_port(f"127.0.0.1:{self.inference_port + replica}")
        server.start()
        self.servers.append(server)
        return policy

    def plan(
        self, queue: str, acting: rollout_pb2.ActingPolicy, num_rollouts: int = 1, tasks: Sequence[str] = (TASK,)
    ) -> None:
        """Plan a group of each task."""
        groups = [
            replay_pb2.GroupPlan(
                group_id=f"{queue}/{task.id}",
                queue=queue,
                task_id=task.id,
                task_json=task.data,
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
        """Wait for a complete group."""
        request = replay_pb2.TakeGroupRequest(
            peer=rpc.peer("learner", "test"), queue=queue, batch_id="batch", ordinal=ordinal, wait_s=PATIENCE_S
        )
        with self._replay() as replay:
            response: replay_pb2.TakeGroupResponse = replay.TakeGroup(request, timeout=2 * PATIENCE_S)
        assert response.HasField("group"), self.log("actor")
        return response.group

    def episode(self, queue: str) -> tuple[replay_pb2.Episode, list[Step]]:
        """Wait for the only episode of a queue."""
        (episode,) = self.take(queue).episodes
        return episode, [decode_step(data) for data in episode.steps]

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        """The replay service's counters."""
        with self._replay() as replay:
            status: replay_pb2.GetReplayStatusResponse = replay.GetReplayStatus(replay_pb2.GetReplayStatusRequest())
            return status

    def fetch_images(self, hashes: Sequence[str]) -> dict[str, bytes]:
        """Screenshots by hash."""
        with self._replay() as replay:
            answers = replay.FetchImages(replay_pb2.FetchImagesRequest(hashes=hashes))
            return {answer.image.hash: answer.image.data for answer in answers}

    def desktops(self) -> list[Path]:
        """Folders of the run's desktops."""
        return list(self.temporary.glob("deskrl-desktops-*/*"))

    def log(self, role: str) -> str:
        """What a role has logged."""
        return (self.folder / f"{role}.log").read_text()

    @contextlib.contextmanager
    def _replay(self) -> Iterator[replay_pb2_grpc.ReplayServiceStub]:
        with rpc.connect_sync(self.replay_address) as channel:
            yield replay_pb2_grpc.ReplayServiceStub(channel)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run with its replay service; whatever the test leaves is ended, and nothing may be left of its desktops."""
    for program in ("Xvfb", "bwrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: desktops cannot be started")
    replay_port, inference_port, _ = free_ports(3)  # the last one is for a second replica
    temporary = Path(tempfile.mkdtemp(prefix="deskrl-"))  # short: the names of sockets have a limit
    this = Run(tmp_path, temporary, f"127.0.0.1:{replay_port}", inference_port)
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
        address = "{this.replay_address}"
        [inference]
        address = "127.0.0.1:{inference_port}"
        """
    )
    (tmp_path / "test").mkdir()
    this.start("replay")
    yield this
    for process in reversed(this.processes):
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.wait(PATIENCE_S)
    for server in this.servers:
        server.stop(None)
    left = list(temporary.iterdir())
    shutil.rmtree(temporary)
    assert left == []
    for log in tmp_path.glob("*.log"):
        assert "Traceback" not in log.read_text() and "never retrieved" not in log.read_text(), log.read_text()


def until(condition: Callable[[], object]) -> None:
    """Wait for something that is seen by looking only."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.05)


def once(do: Callable[[], object]) -> Callable[[], None]:
    """The same, but only the first time."""
    todo = [do]

    def maybe() -> None:
        if todo:
            todo.pop()()

    return maybe


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


def assert_demonstration(run: Run, episode: replay_pb2.Episode) -> None:
    """An episode is one from which the learner can imitate."""
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


def test_sampled_steps_carry_exactly_what_inference_said(run: Run) -> None:
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval")
    assert (episode.result.reward, episode.result.num_steps) == (1.0, 3)
    assert len(policy.asked) == len(policy.answered) == 3
    for step, asked, said in zip(steps, policy.asked, policy.answered, strict=True):
        assert step.prompt_ids == tuple(said.prompt_ids) and step.action_ids == tuple(said.action_ids)
        assert step.logprobs == tuple(said.logprobs) and step.text == said.text
        assert step.spans == tuple(Span(s.version.lineage, s.version.step, s.start, s.end) for s in said.versions)
        assert step.processor_hash == "processor" and step.temperature == 0.75 and step.messages == ()
        assert [image.hash for image in asked.images] == [step.screenshot], "each screenshot crosses the wire once"
        assert asked.temperature == 0.75
    assert [len(step.images) for step in steps] == [1, 2, 2], "the context is a window of two"
    assert [step.action["kind"] for step in steps] == ["type", "hotkey", "finished"]
    assert steps[0].timings_ms.keys() >= set(PARTS)
    answers = [
        m.contents[0].token_ids.ids for m in policy.asked[2].messages if m.role == inference_pb2.MESSAGE_ROLE_ASSISTANT
    ]
    assert [bytes(ids).decode() for ids in answers] == list(MAKE_THE_FOLDER[:2]), (
        "said again as the ids that were sampled"
    )


def test_a_server_that_forgets_screenshots_is_sent_them_again(run: Run) -> None:
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, forgets=True))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval")
    assert episode.result.reward == 1.0
    assert len(policy.asked) > len(policy.answered) == len(steps)


def test_a_replica_that_is_away_is_stood_in_for_by_another(run: Run) -> None:
    run.serve(PolicyDouble(MAKE_THE_FOLDER), replica=1)
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=4)
    run.start("actor", inference__num_replicas=2, desktop__num_envs=2)
    group = run.take("eval")
    assert [episode.result.reward for episode in group.episodes] == [1.0] * 4
    assert not run.status().faults


def test_an_unreachable_policy_is_a_fault(run: Run) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor", actor__act_timeout_s=0.5, replay__max_faults=1)
    until(lambda: run.status().faults)
    assert set(run.status().faults) == {"FAULT_KIND_INFERENCE"}


def test_what_is_no_action_ends_the_episode_unrewarded(run: Run) -> None:
    run.serve(PolicyDouble((*MAKE_THE_FOLDER[:2], NONSENSE)))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, _ = run.episode("eval")
    assert (episode.result.reward, episode.result.num_steps) == (0.0, 3)
    assert episode.result.termination == rollout_pb2.TERMINATION_FORMAT_ERROR and not episode.result.format_ok


def test_a_policy_that_ends_its_desktop_has_failed_and_the_next_episode_gets_a_fresh_one(run: Run) -> None:
    run.serve(PolicyDouble((END_EVERYTHING, *MAKE_THE_FOLDER[1:])))
    run.plan("eval/0", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, steps = run.episode("eval/0")
    assert (episode.result.reward, episode.result.num_steps, episode.num_faults) == (0.0, 1, 0)
    assert episode.result.termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED
    assert steps[0].action["text"] == "kill -9 -1\n"
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert run.take("demo").episodes[0].result.reward == 1.0


@pytest.mark.parametrize("command", [":(){ :|:& };:", "rm -rf --no-preserve-root / ~", "cat /dev/zero | tail"])
def test_what_a_policy_does_to_its_desktop_is_never_a_fault(run: Run, command: str) -> None:
    ruin = f"Thought: Let it end.\nAction: type(content='{command}\\n')"
    policy = run.serve(PolicyDouble((ruin, "Thought: So.\nAction: wait()", MAKE_THE_FOLDER[-1])))
    run.plan("eval/0", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor", desktop__memory_bytes=512 * 1024**2, desktop__step_timeout_s=10)
    episode, steps = run.episode("eval/0")
    assert (episode.result.reward, episode.num_faults) == (0.0, 0)
    assert steps[0].action["text"] == f"{command}\n" and policy.answered[0].text == ruin
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert run.take("demo").episodes[0].result.reward == 1.0, "the next episode has a desktop as good as new"


def test_a_desktop_that_dies_by_itself_costs_the_policy_nothing(run: Run) -> None:
    def kill_the_desktop() -> None:
        for folder in run.desktops():
            for process in processes_of(folder):
                os.kill(process, signal.SIGKILL)

    kill_once = once(kill_the_desktop)
    run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda turn: kill_once()))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    episode, _ = run.episode("eval")
    assert (episode.result.reward, episode.num_faults) == (1.0, 1)
    assert dict(run.status().faults) == {"FAULT_KIND_DESKTOP_LOST": 1}


def test_an_episode_survives_the_death_of_replay(run: Run) -> None:
    def kill_replay() -> None:
        replay = run.processes[0]
        replay.kill()
        replay.wait()
        threading.Thread(target=run.start, args=("replay",)).start()

    kill_once = once(kill_replay)
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda turn: kill_once() if turn == 1 else None))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    run.start("actor")
    until(lambda: len(run.processes) == 3 and rpc.is_healthy(run.replay_address))
    episode, steps = run.episode("eval")
    assert (episode.result.reward, len(steps), episode.num_faults) == (1.0, 3, 0)
    assert len(policy.answered) == 3, "nothing was played twice"
    assert run.status().num_leases_expired == 0


def test_an_actor_that_lost_its_lease_abandons_the_episode(run: Run) -> None:
    frozen = once(lambda: run.processes[-1].send_signal(signal.SIGSTOP))
    replay = run.processes[0]
    replay.terminate()
    replay.wait(PATIENCE_S)
    run.start("replay", replay__lease_ttl_s=1)
    policy = run.serve(PolicyDouble(MAKE_THE_FOLDER, before=lambda turn: frozen() if turn == 1 else None))
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED)
    actor = run.start("actor")
    until(lambda: run.status().num_leases_expired)
    actor.send_signal(signal.SIGCONT)
    episode, steps = run.episode("eval")
    assert (episode.result.reward, len(steps), episode.num_faults) == (1.0, 3, 0)
    assert "abandoned" in run.log("actor")
    assert len(policy.answered) > 3, "it was played again from its start"


@pytest.fixture
def thinking(run: Run) -> Iterator[Callable[[], int]]:
    """A policy that thinks and does not answer; says how many episodes are waiting for it."""
    asked: list[int] = []
    enough = threading.Event()

    def think(turn: int) -> None:
        asked.append(turn)
        enough.wait(PATIENCE_S)

    run.serve(PolicyDouble(MAKE_THE_FOLDER, before=think))
    yield lambda: len(asked)
    enough.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(run: Run, thinking: Callable[[], int], number: signal.Signals) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=3)
    actor = run.start("actor", desktop__num_envs=2)
    until(lambda: thinking() == 2)
    actor.send_signal(number)
    assert actor.wait(PATIENCE_S) == 0
    (queue,) = run.status().queues
    assert (queue.num_planned, queue.num_leased) == (3, 0), "all of the work is given back"
    assert run.desktops() == []


def test_a_killed_actor_leaves_no_process_and_the_next_one_removes_the_rest(
    run: Run, thinking: Callable[[], int]
) -> None:
    run.plan("eval", rollout_pb2.ACTING_POLICY_SAMPLED, num_rollouts=2)
    actor = run.start("actor", desktop__num_envs=2)
    until(lambda: thinking() == 2)
    left = run.desktops()
    assert len(left) == 2 and all(processes_of(folder) for folder in left)
    actor.kill()
    actor.wait()
    until(lambda: not any(processes_of(folder) for folder in left))
    run.plan("demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
    run.start("actor")
    assert run.take("demo").episodes[0].result.reward == 1.0
    assert not any(folder.exists() for folder in left)


def test_an_actor_that_is_not_of_the_run_is_refused(run: Run) -> None:
    command = [sys.executable, "-m", "deskrl.core.cli", "actor", str(run.folder / "run.toml"), "--index", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert refused.returncode == 2
    assert "there is no actor 1" in refused.stderr and "count actors from 0" in refused.stderr
