"""Benchmark of network traffic per episode, and of memory use over many episodes.

A relay on each connection (actor to inference, actor to replay, replay to learner) counts all bytes that TCP carries in
both directions during an episode of 15 steps. One side is deskrl, which sends each screenshot once per connection. The
other side is the same code, modified to send all screenshots of the context with each step, like clients that do not
refer to screenshots by hash. Both sides are measured in each turn. `ratio` is the traffic of the modified side divided
by that of deskrl over all connections, median of the turns, with the last five screenshots as context; `of_context` has
the traffic for each context and connection. Screenshots have 1280×720 pixels and about the size of real ones.

Afterwards the resident memory of replay and of an actor is measured over 2,000 short episodes on simulated desktops:
after 500 episodes, after 2,000, and the growth in between. Batches are taken and committed as soon as they are
complete, and retention removes old episodes.

    python tests/bench/wire.py [--turns 5] [--episodes 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from modelled_roles_kit import EpisodeLengths, ModelledLearner, ModelledPolicy, make_config, start_actors, start_replay
from PIL import Image
from ports_kit import free_ports
from relay_kit import Relay

from deskrl.actor import materialize_tasks
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.inference_client import InferenceClient, InferenceSession
from deskrl.actor.agent.policies import open_served_policy
from deskrl.actor.desktop_starts import DesktopStarts
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.actor.episode_sender import EpisodeSender
from deskrl.actor.lease import Lease
from deskrl.actor.lease_client import LeaseClient
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.worker import Worker
from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.step_codec import Step
from deskrl.learner import replay_client as learner_client
from deskrl.learner.episode_types import decode_group
from deskrl.proto.v1 import common_pb2, inference_pb2, replay_pb2, rollout_pb2, rollout_pb2_grpc

NUM_STEPS = 15
PROMPT_TOKENS = 6000
NEVER_FINISHES = EpisodeLengths(mean=NUM_STEPS + 1, sigma=0, longest=NUM_STEPS + 1)
SHORT = EpisodeLengths(mean=4, sigma=1, longest=6)
SHORT_PROMPT_TOKENS = 300
EARLY_EPISODES = 500
BATCH_EPISODES, NUM_ROLLOUTS = 40, 8
STORE_BYTES = 32 * 1024**2
CONNECTIONS = ("actor_inference", "actor_replay", "replay_learner")
_TIMEOUT_S = 1200.0


class MandelbrotDesktop(SimulatedDesktop):
    """Simulated desktop whose encoded screenshots are about as large as real ones."""

    _num_shown = 0

    async def screenshot(self) -> Image.Image:
        """Return a new image."""
        MandelbrotDesktop._num_shown += 1
        left = -2.0 + 1e-4 * MandelbrotDesktop._num_shown
        image = Image.effect_mandelbrot(self._size, (left, -1.2, 1.0, 1.2), 64)
        return image.convert("RGB")


class ResendingSender(EpisodeSender):
    """Sends all screenshots of the context with each step."""

    def __init__(self, stub: rollout_pb2_grpc.RolloutServiceStub, peer: common_pb2.Peer, lease: Lease) -> None:
        super().__init__(stub, peer, lease)
        self._images: dict[str, common_pb2.Image] = {}

    def add_image(self, image: common_pb2.Image) -> None:
        """Keep an image for the steps that contain it."""
        self._images[image.hash] = image

    def add_step(self, step: Step) -> None:
        """Send the screenshots of a step, then the step."""
        self._new_images = [self._images[name] for name in step.images]
        super().add_step(step)

    async def finish(self, end: rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault) -> None:
        """Send the last screenshot, then the end."""
        self._new_images = list(self._images.values())[-1:]
        await super().finish(end)


class ResendingLeaseClient(LeaseClient):
    """Lease client whose episode streams resend screenshots."""

    def open_episode(self, lease: Lease) -> EpisodeSender:
        """Return a stream that resends screenshots."""
        return ResendingSender(self._stub, self._peer, lease)


class ResendingSession(InferenceSession):
    """Sends all screenshots of the context with each request."""

    async def act(
        self, messages: Sequence[inference_pb2.ChatMessage], screenshot: common_pb2.Image, seed: int
    ) -> inference_pb2.SampledAction:
        """Send all screenshots, as if none had been sent before."""
        self._sent.clear()
        return await super().act(messages, screenshot, seed)


class ResendingInferenceClient(InferenceClient):
    """Inference client whose sessions resend screenshots."""

    def open_session(self, episode_id: str, temperature: float) -> InferenceSession:
        """Return a session that resends screenshots."""
        return ResendingSession(self, episode_id, temperature)


class RelayedServices:
    """Services behind relays, and an actor and a learner that use them."""

    def __init__(self, folder: Path, context: str) -> None:
        self.config = make_config(
            folder,
            free_ports(4),
            agent={"context": context},
            tasks={"max_steps": NUM_STEPS},
            desktop={"simulated": {"time_scale": 1e-6}},
        )
        self._policy = ModelledPolicy(self.config.inference.address, 0.0, PROMPT_TOKENS, NEVER_FINISHES)
        self._replay = start_replay(self.config)
        targets = (self.config.inference.address, self.config.replay.address, self.config.replay.address)
        self._relays = dict(zip(CONNECTIONS, map(Relay, targets), strict=True))
        self._task = materialize_tasks.load(self.config)[0][0]
        self.image_bytes = 0

    def close(self) -> None:
        """Stop relays and services."""
        for relay in self._relays.values():
            relay.close()
        self._replay.close()
        self._policy.close()

    def measure_turn(self, queue: str, resend: bool) -> dict[str, int]:
        """Run one episode and fetch its batch; return the number of bytes on each connection."""
        before = {name: relay.num_bytes for name, relay in self._relays.items()}
        learner = learner_client.ReplayClient(self._relays["replay_learner"].address, "bench", StopEvent())
        try:
            learner.plan([self._plan(queue)])
            steps = asyncio.run(self._run_episode(learner, queue, resend))
            self._fetch(learner, steps, resend)
        finally:
            learner.close()
        return {name: relay.num_bytes - before[name] for name, relay in self._relays.items()}

    def _plan(self, queue: str) -> replay_pb2.GroupPlan:
        return replay_pb2.GroupPlan(
            group_id=f"{queue}/0",
            queue=queue,
            task_id=self._task.id,
            task_json=self._task.data,
            seeds=[ids.derive_seed(queue)],
            max_steps=NUM_STEPS,
            temperature=1.0,
            acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        )

    async def _run_episode(self, learner: learner_client.ReplayClient, queue: str, resend: bool) -> tuple[Step, ...]:
        leases = (ResendingLeaseClient if resend else LeaseClient)(self._relays["actor_replay"].address, "bench")
        section = self.config.inference.model_copy(update={"address": self._relays["actor_inference"].address})
        inference = (ResendingInferenceClient if resend else InferenceClient)(section, "bench", timeout_s=60.0)
        desktop = self.config.desktop
        make_desktop = partial(MandelbrotDesktop, desktop, "mandelbrot")
        open_policy = partial(open_served_policy, inference)
        starts = DesktopStarts(desktop.start_retry_timeout_s)
        agent, reward = Agent(self.config.agent), make_reward(self.config)
        worker = Worker(leases, open_policy, agent, make_desktop, starts, desktop, reward=reward)
        tasks = {
            asyncio.create_task(worker.run()),
            asyncio.create_task(leases.keep_alive(self.config.replay.lease_ttl_s, starts)),
        }
        group = await asyncio.to_thread(next, learner.take_groups(queue, queue, [0], list, lambda: None))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await worker.close()
        await asyncio.gather(leases.close(), inference.close())
        (episode,) = decode_group(group).members
        assert len(episode.steps) == NUM_STEPS
        return episode.steps

    def _fetch(self, learner: learner_client.ReplayClient, steps: Sequence[Step], resend: bool) -> None:
        """Fetch the screenshots of each step, as the rows of a batch need them."""
        if resend:
            for step in steps:
                list(learner._stub.FetchImages(replay_pb2.FetchImagesRequest(hashes=step.images)))
            return
        images: dict[str, bytes] = {}
        for step in steps:
            images |= learner.fetch_images(step.images)
        self.image_bytes = round(statistics.fmean(map(len, images.values())))


def measure_traffic(folder: Path, context: str, turns: int) -> dict[str, object]:
    """Return the median traffic on each connection, for both sides."""
    services = RelayedServices(folder, context)
    try:
        ours, resent = [], []
        for turn in range(turns):
            ours.append(services.measure_turn(f"ours{turn}", resend=False))
            resent.append(services.measure_turn(f"resent{turn}", resend=True))
    finally:
        services.close()

    def kilobytes(sides: list[dict[str, int]], name: str) -> int:
        return round(statistics.median(side[name] for side in sides) / 1000)

    pairs = list(zip(ours, resent, strict=True))
    return {
        "ratio": round(statistics.median(sum(two.values()) / sum(one.values()) for one, two in pairs), 2),
        "screenshot_kb": round(services.image_bytes / 1000),
        "kb": {name: kilobytes(ours, name) for name in CONNECTIONS},
        "resent_kb": {name: kilobytes(resent, name) for name in CONNECTIONS},
    }


def measure_memory(folder: Path, num_episodes: int) -> dict[str, object]:
    """Return the resident memory of replay and an actor under load, in MB."""
    config = memory_config(folder)
    policy = ModelledPolicy(config.inference.address, 0.0, SHORT_PROMPT_TOKENS, SHORT)
    replay = start_replay(config)
    learner = ModelledLearner(config, policy, 0.0)
    (actor,) = start_actors(config)
    roles = {"replay": replay, "actor": actor}
    learner.start()
    try:
        rss_mb = {}
        for checkpoint in (EARLY_EPISODES, num_episodes):
            learner.wait_for(checkpoint // BATCH_EPISODES, _TIMEOUT_S)
            rss_mb[checkpoint] = {name: round(role.rss_bytes() / 1e6, 1) for name, role in roles.items()}
    finally:
        learner.close()
        for role in (actor, replay):
            role.close()
        policy.close()
    early, late = rss_mb.values()
    return {
        "rss_mb": rss_mb,
        "growth_mb": {name: round(late[name] - early[name], 1) for name in roles},
    }


def memory_config(folder: Path) -> RunConfig:
    """Return a configuration with fast desktops and a store that is full early."""
    return make_config(
        folder,
        free_ports(4),
        tasks={"num_rollouts": NUM_ROLLOUTS, "max_steps": SHORT.longest},
        desktop={
            "num_envs": BATCH_EPISODES,
            "width": 168,
            "height": 112,
            "simulated": {"time_scale": 1e-4, "random_success_rate": 0.5},
        },
        actor={"desktops_per_actor": BATCH_EPISODES},
        replay={"max_bytes": STORE_BYTES},
        learner={
            "grpo": {
                "num_updates": 10_000,
                "groups_per_batch": BATCH_EPISODES // NUM_ROLLOUTS,
                "zero_variance_groups": "keep",
            }
        },
    )


def main() -> None:
    """Measure, and print the report as one JSON line."""
    parser = argparse.ArgumentParser(description="network traffic per episode, and memory use over many episodes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=2000, help="number of episodes of the memory measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        of_context = {
            context: measure_traffic(Path(folder), context, options.turns) for context in ("window", "episode")
        }
        memory = measure_memory(Path(folder), options.episodes)
    report = {"bench": "wire", "ratio": of_context["window"]["ratio"], "of_context": of_context, "turns": options.turns}
    print(json.dumps({**report, "episodes": options.episodes, **memory}))


if __name__ == "__main__":
    main()
