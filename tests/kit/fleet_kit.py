"""A fleet without desktops, engine or GPU: real replay and actor processes, a modelled policy and a modelled learner.

The policy speaks the real contract over gRPC and takes a stated time for an action; it decides how long an episode is.
The learner takes real batches through its own role's code (`BatchTaker`), takes a stated time to learn them, moves the
version and commits. Both live in the caller's process. Knows no schedule and measures nothing but what happened when.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil

from deskrl.actor import prepare
from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.lifetime import StopEvent, supervised_environment
from deskrl.learner.lineage import Branch, VersionTree
from deskrl.learner.plan import TRAIN, Curriculum
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.state import LearnerState
from deskrl.learner.stopping import Stopped
from deskrl.learner.take import BatchTaker, TakenBatch
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2

LINEAGE = "fleet"
PROCESSOR = "modelled"
ACTION_TOKENS = 40
_START_S = 60.0
_SAMPLE = re.compile(r'^(deskrl_\w+)(?:\{\w+="([^"]*)"\})? ([-+.\deE]+)$', re.MULTILINE)


@dataclass(frozen=True)
class EpisodeLengths:
    """How many turns the modelled policy takes: normal, rounded, clipped."""

    mean: float = 11.0
    sigma: float = 4.0
    shortest: int = 3
    longest: int = 15

    def draw(self, seed: int) -> int:
        """The length that follows from a seed."""
        return min(self.longest, max(self.shortest, round(Random(seed).gauss(self.mean, self.sigma))))


class ModelledPolicy(inference_pb2_grpc.InferenceServiceServicer):
    """Types until an episode has the length that its first seed draws, then finishes. Holds names of screenshots only.

    Args:
        address: where it listens.
        act_s: what an action takes, in real seconds.
        prompt_tokens: prompt ids in each answer.
        lengths: of episodes.
    """

    def __init__(self, address: str, act_s: float, prompt_tokens: int, lengths: EpisodeLengths) -> None:
        self.version = common_pb2.PolicyVersion(lineage=LINEAGE)
        """The version that actions which begin from now on are sampled under."""
        self.num_acts = 0
        self._address = address
        self._act_s = act_s
        self._lengths = lengths
        self._prompt_ids = list(range(prompt_tokens))
        self._held: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self) -> None:
        server = rpc.make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        await rpc.start_server(server, self._address, ["deskrl.proto.v1.InferenceService"])
        await self._over.wait()
        await server.stop(0)

    async def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        """See inference.proto."""
        version = self.version
        contents = [content for message in request.messages for content in message.contents]
        self._held.update(image.hash for image in request.images)
        named = [content.image_hash for content in contents if content.WhichOneof("kind") == "image_hash"]
        if missing := [name for name in named if name not in self._held]:
            return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=missing))
        await asyncio.sleep(self._act_s)
        self.num_acts += 1
        said = [content.token_ids.ids for content in contents if content.WhichOneof("kind") == "token_ids"]
        # The first action's first token tells the length, so that nothing of an episode is kept here.
        length = said[0][0] if said else self._lengths.draw(request.seed)
        action = "finished()" if len(said) + 1 == length else "type(content='on ')"
        span = common_pb2.VersionSpan(version=version, start=0, end=ACTION_TOKENS)
        sampled = inference_pb2.SampledAction(
            prompt_ids=self._prompt_ids,
            action_ids=[length] * ACTION_TOKENS,
            logprobs=[-0.5] * ACTION_TOKENS,
            versions=[span],
            text=f"Thought: Go on.\nAction: {action}",
            processor_hash=PROCESSOR,
            stopped=True,
        )
        return inference_pb2.ActResponse(action=sampled)


@dataclass(frozen=True)
class Update:
    """One update of the modelled learner."""

    ended_s: float
    """On the monotonic clock."""
    waited_s: float
    """For the batch, real seconds."""
    num_episodes: int
    num_dropped: Counter[str]
    """Episodes of groups that were not learnt from, by cause."""
    max_staleness: int
    """Of any token in any group that was taken, at the time of taking."""


class ModelledLearner:
    """Takes batches, learns each for as long as its episodes take, moves the version, commits.

    Args:
        config: of the run.
        policy: told of each version.
        episode_s: what learning takes for one episode, in real seconds.
    """

    def __init__(self, config: RunConfig, policy: ModelledPolicy, episode_s: float) -> None:
        self.updates: list[Update] = []
        self._policy = policy
        self._episode_s = episode_s
        self._stop = StopEvent()
        self._replay = ReplayClient(config.replay.address, "learner", self._stop)
        tasks = {task.id: task.data for task in prepare.load(config)[0]}
        self._taker = BatchTaker(config, Curriculum(config, tasks), self._replay, True, PROCESSOR)
        self._state = LearnerState(lineage=LINEAGE)
        self._tree = VersionTree((Branch(LINEAGE, "", 0),))
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin to learn."""
        self._thread.start()

    def wait_for(self, num_updates: int, timeout_s: float) -> None:
        """Until so many updates are done."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.updates) < num_updates:
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self.updates)} of {num_updates} updates in {timeout_s:.0f} s")
            time.sleep(0.02)

    def close(self) -> None:
        """Learn no more."""
        self._stop.set()
        self._thread.join()
        self._replay.close()

    def _run(self) -> None:
        try:
            self._replay.set_policy_version(self._policy.version, 0)
            while not self._stop.is_set():
                self._update()
        except Stopped:
            pass
        except BaseException as error:
            self._failure = error

    def _update(self) -> None:
        started_s = time.monotonic()
        batch = self._taker.take(self._state, self._distance)
        waited_s = time.monotonic() - started_s
        self._stop.wait(self._episode_s * sum(len(selection.trajectories) for selection in batch.kept))
        max_staleness = max(
            self._distance(span) or 0 for member in batch.members for step in member.steps for span in step.spans
        )
        self._state.num_updates += 1
        self._policy.version = common_pb2.PolicyVersion(lineage=LINEAGE, step=self._state.num_updates)
        verdicts = [
            replay_pb2.GroupVerdict(group_id=selection.group_id, dropped_because=selection.dropped_because)
            for selection in batch.selections
        ]
        self._replay.commit(TRAIN, batch.batch_id, verdicts, self._policy.version)
        self._replay.set_policy_version(self._policy.version, self._state.num_updates)
        self.updates.append(
            Update(time.monotonic(), waited_s, len(batch.members), _dropped_episodes(batch), max_staleness)
        )

    def _distance(self, span: Any) -> int | None:
        return self._tree.distance(span.lineage, span.step, self._state.num_updates)


def _dropped_episodes(batch: TakenBatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group, selection in zip(batch.groups, batch.selections, strict=True):
        if selection.dropped_because:
            counts[selection.dropped_because] += len(group.members)
    return counts


class Role:
    """A role as a process of its own, started as a deploy script starts it.

    Args:
        config: of the run; its resolved form lies in the run's folder.
        command: of `deskrl`, with its options.
    """

    def __init__(self, config: RunConfig, *command: str) -> None:
        name = "-".join(command).replace("--index-", "")
        path = config.folder / "config.json"
        if not path.exists():
            config.folder.mkdir(parents=True, exist_ok=True)
            dump_config(config, path)
        line = [sys.executable, "-m", "deskrl.core.cli", command[0], str(path), *command[1:]]
        self.log = config.folder / f"{name}.log"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                line, stdout=log, stderr=log, env={**os.environ, **supervised_environment()}
            )
        self._watched = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(self._watched.memory_info().rss)

    def close(self) -> None:
        """End it, in order."""
        self._process.terminate()
        self._process.wait()


def start_replay(config: RunConfig) -> Role:
    """The replay service, answering."""
    replay = Role(config, "replay")
    with rpc.connect_sync(config.replay.address) as channel:
        grpc.channel_ready_future(channel).result(timeout=_START_S)
    return replay


def start_actors(config: RunConfig) -> list[Role]:
    """All actors of a run, answering for their metrics."""
    num_actors = -(-config.desktop.num_envs // config.actor.desktops_per_actor)
    actors = [Role(config, "actor", "--index", str(index)) for index in range(num_actors)]
    deadline_s = time.monotonic() + _START_S
    for index, actor in enumerate(actors):
        while not _listens(config.actor.metrics_port + index):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"an actor did not start; see {actor.log}")
            time.sleep(0.1)
    return actors


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_metrics(ports: Sequence[int]) -> dict[tuple[str, str], float]:
    """Prometheus samples by name and label, summed over processes."""
    total: defaultdict[tuple[str, str], float] = defaultdict(float)
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_START_S) as answer:
            for name, label, value in _SAMPLE.findall(answer.read().decode()):
                total[name, label] += float(value)
    return dict(total)


def make_config(folder: Path, ports: Sequence[int], **sections: Any) -> RunConfig:
    """A run on simulated desktops: three ports for replay, policy and replay's metrics, then one for each actor.

    Args:
        folder: of all runs.
        ports: free ones, those of the actors in a row.
        sections: of the configuration.
    """
    replay, policy, replay_metrics, first_actor = ports[:4]
    defaults: dict[str, dict[str, Any]] = {
        "desktop": {"provider": "simulated", "step_timeout_s": 600, "start_timeout_s": 600},
        "actor": {"metrics_port": first_actor, "act_timeout_s": 600},
        "replay": {"address": f"127.0.0.1:{replay}", "metrics_port": replay_metrics},
        "inference": {"address": f"127.0.0.1:{policy}"},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    return RunConfig.model_validate({"runs": folder, "name": ids.new_id("fleet"), **merged})
