"""Modelled policy and learner, and real replay and actor processes, for fleets without desktops, engine or GPU.

The modelled policy implements the inference service over gRPC. Its actions take a given time, and it determines the
length of each episode. The modelled learner takes real batches with the learner's own code (`BatchBuilder`), spends a
given time on each, advances the policy version and commits. Both run in the process of the caller.
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

from deskrl.actor import materialize_tasks
from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.process_lifecycle import StopEvent, supervised_environment
from deskrl.learner.batch_builder import BatchBuilder, GroupBatch
from deskrl.learner.cancellation import Stopped
from deskrl.learner.curriculum import TRAIN, Curriculum
from deskrl.learner.policy_versions import Lineage, LineageTree
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.train_state import TrainState
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2

LINEAGE = "fleet"
PROCESSOR = "modelled"
ACTION_TOKENS = 40
_START_S = 60.0
_SAMPLE = re.compile(r'^(deskrl_\w+)(?:\{\w+="([^"]*)"\})? ([-+.\deE]+)$', re.MULTILINE)


@dataclass(frozen=True)
class EpisodeLengths:
    """Distribution of the number of steps in an episode: normal, rounded, clipped."""

    mean: float = 11.0
    sigma: float = 4.0
    shortest: int = 3
    longest: int = 15

    def draw(self, seed: int) -> int:
        """Return the length that a seed determines."""
        return min(self.longest, max(self.shortest, round(Random(seed).gauss(self.mean, self.sigma))))


class ModelledPolicy(inference_pb2_grpc.InferenceServiceServicer):
    """Policy that types until an episode has the length that its first seed determines, then finishes.

    It stores only the hashes of screenshots.

    Args:
        address: address to listen on, as host:port.
        act_s: duration of an action in real seconds.
        prompt_tokens: number of prompt ids in each response.
        lengths: distribution of episode lengths.
    """

    def __init__(self, address: str, act_s: float, prompt_tokens: int, lengths: EpisodeLengths) -> None:
        self.version = common_pb2.PolicyVersion(lineage=LINEAGE)
        """Policy version of the actions that start from now on."""
        self.num_acts = 0
        self._address = address
        self._act_s = act_s
        self._lengths = lengths
        self._prompt_ids = list(range(prompt_tokens))
        self._known_hashes: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()

    def close(self) -> None:
        """Stop the service."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    async def _serve(self) -> None:
        server = rpc.make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        await rpc.start_server(server, self._address, ["deskrl.proto.v1.InferenceService"])
        await self._closed.wait()
        await server.stop(0)

    async def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        """Return a scripted action after `act_s` seconds; see inference.proto."""
        version = self.version
        contents = [content for message in request.messages for content in message.contents]
        self._known_hashes.update(image.hash for image in request.images)
        referenced = [content.image_hash for content in contents if content.WhichOneof("kind") == "image_hash"]
        if missing := [name for name in referenced if name not in self._known_hashes]:
            return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=missing))
        await asyncio.sleep(self._act_s)
        self.num_acts += 1
        previous_actions = [content.token_ids.ids for content in contents if content.WhichOneof("kind") == "token_ids"]
        # The first token of the first action encodes the length, so that no state per episode is needed.
        length = previous_actions[0][0] if previous_actions else self._lengths.draw(request.seed)
        action = "finished()" if len(previous_actions) + 1 == length else "type(content='on ')"
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
    """Measurements of one update of the modelled learner."""

    ended_s: float
    """End of the update, on the monotonic clock."""
    waited_s: float
    """Real seconds for which the learner waited for the batch."""
    num_episodes: int
    num_dropped: Counter[str]
    """Episodes of groups that were not trained on, by cause."""
    max_staleness: int
    """Maximum staleness of the tokens in the batch, when it was taken."""


class ModelledLearner:
    """Learner that takes batches, waits for the modelled duration of training, advances the version and commits.

    Args:
        config: configuration of the run.
        policy: policy that receives each new version.
        episode_s: duration of training on one episode in real seconds.
    """

    def __init__(self, config: RunConfig, policy: ModelledPolicy, episode_s: float) -> None:
        self.updates: list[Update] = []
        self._policy = policy
        self._episode_s = episode_s
        self._stop = StopEvent()
        self._replay = ReplayClient(config.replay.address, "learner", self._stop)
        tasks = {task.id: task.data for task in materialize_tasks.load(config)[0]}
        self._batch_builder = BatchBuilder(config, Curriculum(config, tasks), self._replay, True, PROCESSOR)
        self._state = TrainState(lineage=LINEAGE)
        self._tree = LineageTree((Lineage(LINEAGE, "", 0),))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Start making updates."""
        self._thread.start()

    def wait_for(self, num_updates: int, timeout_s: float) -> None:
        """Wait until `num_updates` updates are done; raises TimeoutError, or the error that stopped the learner."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.updates) < num_updates:
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self.updates)} of {num_updates} updates in {timeout_s:.0f} s")
            time.sleep(0.02)

    def close(self) -> None:
        """Stop making updates."""
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
            self._error = error

    def _update(self) -> None:
        started_s = time.monotonic()
        batch = self._batch_builder.build(self._state, self._distance)
        waited_s = time.monotonic() - started_s
        self._stop.wait(self._episode_s * sum(len(group.trajectories) for group in batch.kept))
        max_staleness = max(
            self._distance(span) or 0 for member in batch.fresh_episodes for step in member.steps for span in step.spans
        )
        self._state.num_updates += 1
        self._policy.version = common_pb2.PolicyVersion(lineage=LINEAGE, step=self._state.num_updates)
        verdicts = [
            replay_pb2.GroupVerdict(group_id=group.group_id, dropped_because=group.dropped_because)
            for group in batch.filtered
        ]
        self._replay.commit(TRAIN, batch.batch_id, verdicts, self._policy.version)
        self._replay.set_policy_version(self._policy.version, self._state.num_updates)
        self.updates.append(
            Update(time.monotonic(), waited_s, len(batch.fresh_episodes), _count_dropped_episodes(batch), max_staleness)
        )

    def _distance(self, span: Any) -> int | None:
        return self._tree.distance(span.lineage, span.step, self._state.num_updates)


def _count_dropped_episodes(batch: GroupBatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group, filtered in zip(batch.groups, batch.filtered, strict=True):
        if filtered.dropped_because:
            counts[filtered.dropped_because] += len(group.members)
    return counts


class FleetProcess:
    """Process of one role, started as by a deployment script.

    Args:
        config: configuration of the run; the resolved form is written to the run directory.
        command: subcommand of `deskrl` with its options.
    """

    def __init__(self, config: RunConfig, *command: str) -> None:
        name = "-".join(command).replace("--index-", "")
        path = config.run_dir / "config.json"
        if not path.exists():
            config.run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(config, path)
        line = [sys.executable, "-m", "deskrl.cli.main", command[0], str(path), *command[1:]]
        self.log = config.run_dir / f"{name}.log"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                line, stdout=log, stderr=log, env={**os.environ, **supervised_environment()}
            )
        self._usage = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Return the resident memory in bytes."""
        return int(self._usage.memory_info().rss)

    def close(self) -> None:
        """Terminate the process and wait for it."""
        self._process.terminate()
        self._process.wait()


def start_replay(config: RunConfig) -> FleetProcess:
    """Start the replay service and wait until it accepts connections."""
    replay = FleetProcess(config, "replay")
    with rpc.connect_sync(config.replay.address) as channel:
        grpc.channel_ready_future(channel).result(timeout=_START_S)
    return replay


def start_actors(config: RunConfig) -> list[FleetProcess]:
    """Start all actors of a run and wait until they serve metrics."""
    num_actors = -(-config.desktop.num_envs // config.actor.desktops_per_actor)
    actors = [FleetProcess(config, "actor", "--index", str(index)) for index in range(num_actors)]
    deadline_s = time.monotonic() + _START_S
    for index, actor in enumerate(actors):
        while not _is_listening(config.actor.metrics_port + index):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"an actor did not start (hint: see {actor.log})")
            time.sleep(0.1)
    return actors


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_metrics(ports: Sequence[int]) -> dict[tuple[str, str], float]:
    """Return Prometheus samples by name and label, summed over the processes at `ports`."""
    total: defaultdict[tuple[str, str], float] = defaultdict(float)
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_START_S) as response:
            for name, label, value in _SAMPLE.findall(response.read().decode()):
                total[name, label] += float(value)
    return dict(total)


def make_config(folder: Path, ports: Sequence[int], **sections: Any) -> RunConfig:
    """Return the configuration of a run on simulated desktops.

    Args:
        folder: directory of runs.
        ports: free ports of replay, policy and replay's metrics, then consecutive ports for the metrics of the actors.
        sections: tables of the configuration, merged over the defaults.
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
