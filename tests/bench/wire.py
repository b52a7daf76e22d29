"""Each screenshot crosses each wire once: bytes of a 15-step episode, and memory that stays as it is.

Bytes are counted by a relay on each wire, everything that TCP carries in both directions: actor to inference, actor to
replay, replay to learner. One side is deskrl as it is; the other is the same code made to send all screenshots of the
context with each step, as clients without names for screenshots do. Turns alternate; `ratio` is the resent bytes over
deskrl's, all wires together, median of the turns, for the context of the last five screenshots; `of_context` has every
context and wire. Screenshots are 1280×720 with about as many bytes as a desktop's.

Then resident memory of replay and of an actor over 2,000 short episodes on simulated desktops, batches taken and
committed as they come, old episodes removed by retention: at 500 episodes, at 2,000, and the growth between.

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

from ports_kit import free_ports

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from fleet_kit import EpisodeLengths, ModelledLearner, ModelledPolicy, make_config, start_actors, start_replay
from PIL import Image
from relay import Relay

from deskrl.actor import prepare
from deskrl.actor.agent.conversation import make_agent
from deskrl.actor.agent.players import sampled_player
from deskrl.actor.agent.policy_client import PolicyClient, PolicySession
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.actor.episode_stream import EpisodeStream
from deskrl.actor.leases import Lease
from deskrl.actor.replay_client import ReplayClient
from deskrl.actor.worker import Worker
from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.lifetime import StopEvent
from deskrl.core.trajectory import Step
from deskrl.learner import replay_client as learner_client
from deskrl.learner.trajectories import decode_group
from deskrl.proto.v1 import common_pb2, inference_pb2, replay_pb2, rollout_pb2, rollout_pb2_grpc

NUM_STEPS = 15
PROMPT_TOKENS = 6000
NEVER_FINISHES = EpisodeLengths(mean=NUM_STEPS + 1, sigma=0, longest=NUM_STEPS + 1)
SHORT = EpisodeLengths(mean=4, sigma=1, longest=6)
SHORT_PROMPT_TOKENS = 300
EARLY_EPISODES = 500
BATCH_EPISODES, ROLLOUTS = 40, 8
STORE_BYTES = 32 * 1024**2
WIRES = ("actor_inference", "actor_replay", "replay_learner")
_TIMEOUT_S = 1200.0


class PaintedDesktop(SimulatedDesktop):
    """A simulated desktop whose screen has about as many bytes as a real one's."""

    _num_shown = 0

    async def screenshot(self) -> Image.Image:
        """A picture that was not there before."""
        PaintedDesktop._num_shown += 1
        left = -2.0 + 1e-4 * PaintedDesktop._num_shown
        picture = Image.effect_mandelbrot(self._size, (left, -1.2, 1.0, 1.2), 64)
        return picture.convert("RGB")


class ResendingStream(EpisodeStream):
    """Sends all screenshots of the context with each step."""

    def __init__(self, stub: rollout_pb2_grpc.RolloutServiceStub, peer: common_pb2.Peer, lease: Lease) -> None:
        super().__init__(stub, peer, lease)
        self._images: dict[str, common_pb2.Image] = {}

    def add_image(self, image: common_pb2.Image) -> None:
        """Keep it for the steps that show it."""
        self._images[image.hash] = image

    def add_step(self, step: Step) -> None:
        """Its screenshots, then the step."""
        self._new_images = [self._images[name] for name in step.images]
        super().add_step(step)

    async def finish(self, end: rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault) -> None:
        """The last screenshot, then the end."""
        self._new_images = list(self._images.values())[-1:]
        await super().finish(end)


class ResendingReplay(ReplayClient):
    """Streams episodes so."""

    def open_episode(self, lease: Lease) -> EpisodeStream:
        """A stream that resends."""
        return ResendingStream(self._stub, self._peer, lease)


class ResendingSession(PolicySession):
    """Sends all screenshots of the context with each request."""

    async def act(
        self, messages: Sequence[inference_pb2.ChatMessage], screenshot: common_pb2.Image, seed: int
    ) -> inference_pb2.SampledAction:
        """As if none had been sent before."""
        self._sent.clear()
        return await super().act(messages, screenshot, seed)


class ResendingPolicy(PolicyClient):
    """Asks so."""

    def open_session(self, episode_id: str, temperature: float) -> PolicySession:
        """A session that resends."""
        return ResendingSession(self, episode_id, temperature)


class Wires:
    """The services behind relays, and who plays and learns through them."""

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
        self._relays = dict(zip(WIRES, map(Relay, targets), strict=True))
        self._task = prepare.load(self.config)[0][0]
        self.image_bytes = 0

    def close(self) -> None:
        """End everything."""
        for relay in self._relays.values():
            relay.close()
        self._replay.close()
        self._policy.close()

    def turn(self, queue: str, resend: bool) -> dict[str, int]:
        """Play one episode and learn from it; bytes on each wire."""
        before = {name: relay.num_bytes for name, relay in self._relays.items()}
        learner = learner_client.ReplayClient(self._relays["replay_learner"].address, "bench", StopEvent())
        try:
            learner.plan([self._plan(queue)])
            steps = asyncio.run(self._play(learner, queue, resend))
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

    async def _play(self, learner: learner_client.ReplayClient, queue: str, resend: bool) -> tuple[Step, ...]:
        make_replay, make_policy = (ResendingReplay, ResendingPolicy) if resend else (ReplayClient, PolicyClient)
        replay = make_replay(self._relays["actor_replay"].address, "bench")
        inference = self.config.inference.model_copy(update={"address": self._relays["actor_inference"].address})
        policy = make_policy(inference, "bench", 60.0)
        desktop = self.config.desktop
        make_desktop = partial(PaintedDesktop, desktop, "painted")
        worker = Worker(replay, partial(sampled_player, policy), make_agent(self.config.agent), make_desktop, desktop)
        tasks = {
            asyncio.create_task(worker.run()),
            asyncio.create_task(replay.keep_alive(self.config.replay.lease_ttl_s)),
        }
        group = await asyncio.to_thread(next, learner.take_groups(queue, queue, [0], list, lambda: None))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await worker.close()
        await asyncio.gather(replay.close(), policy.close())
        (episode,) = decode_group(group).members
        assert len(episode.steps) == NUM_STEPS
        return episode.steps

    def _fetch(self, learner: learner_client.ReplayClient, steps: Sequence[Step], resend: bool) -> None:
        """The screenshots of each step in turn, as rows of a batch need them."""
        if resend:
            for step in steps:
                list(learner._stub.FetchImages(replay_pb2.FetchImagesRequest(hashes=step.images)))
            return
        images: dict[str, bytes] = {}
        for step in steps:
            images |= learner.fetch_images(step.images)
        self.image_bytes = round(statistics.fmean(map(len, images.values())))


def measure_wires(folder: Path, context: str, turns: int) -> dict[str, object]:
    """Median bytes on each wire, both sides."""
    wires = Wires(folder, context)
    try:
        ours, resent = [], []
        for turn in range(turns):
            ours.append(wires.turn(f"ours{turn}", resend=False))
            resent.append(wires.turn(f"resent{turn}", resend=True))
    finally:
        wires.close()

    def kilobytes(sides: list[dict[str, int]], name: str) -> int:
        return round(statistics.median(side[name] for side in sides) / 1000)

    pairs = list(zip(ours, resent, strict=True))
    return {
        "ratio": round(statistics.median(sum(two.values()) / sum(one.values()) for one, two in pairs), 2),
        "screenshot_kb": round(wires.image_bytes / 1000),
        "kb": {name: kilobytes(ours, name) for name in WIRES},
        "resent_kb": {name: kilobytes(resent, name) for name in WIRES},
    }


def measure_memory(folder: Path, num_episodes: int) -> dict[str, object]:
    """Resident memory of replay and an actor while they work, in MB."""
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
    """Desktops that take next to no time, and a store that is soon full."""
    return make_config(
        folder,
        free_ports(4),
        tasks={"rollouts": ROLLOUTS, "max_steps": SHORT.longest},
        desktop={
            "num_envs": BATCH_EPISODES,
            "width": 168,
            "height": 112,
            "simulated": {"time_scale": 1e-4, "luck": 0.5},
        },
        actor={"desktops_per_actor": BATCH_EPISODES},
        replay={"max_bytes": STORE_BYTES},
        learner={
            "grpo": {
                "num_updates": 10_000,
                "groups_per_batch": BATCH_EPISODES // ROLLOUTS,
                "groups_without_spread": "keep",
            }
        },
    )


def main() -> None:
    """Measure, print one line."""
    parser = argparse.ArgumentParser(description="bytes on the wire, and memory over many episodes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=2000, help="over which memory is watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        of_context = {context: measure_wires(Path(folder), context, options.turns) for context in ("window", "episode")}
        memory = measure_memory(Path(folder), options.episodes)
    report = {"bench": "wire", "ratio": of_context["window"]["ratio"], "of_context": of_context, "turns": options.turns}
    print(json.dumps({**report, "episodes": options.episodes, **memory}))


if __name__ == "__main__":
    main()
