"""A fleet under measurement: all its processes, and what they did in a window of time. Knows no comparison.

Times are real ones where they end in `_s`; rates "a minute" are in the desktops' own time, `speedup` times faster.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from fleet_kit import (
    EpisodeLengths,
    ModelledLearner,
    ModelledPolicy,
    Role,
    Update,
    make_config,
    read_metrics,
    start_actors,
    start_replay,
)
from ports_kit import free_ports

from deskrl.core.config import RunConfig

ACT_S, BATCH_ACT_S = 5.0, 8.0
LEARN_S = 150.0
"""What the learner takes for a batch of as many episodes as there are desktops."""
ROLLOUTS = 8
MAX_STALENESS = 4
LENGTHS = EpisodeLengths()
TIMEOUT_S = 3600.0
WAITING = ("idle", "replacing", "waiting_for_others")
_SAMPLE_EVERY_S = 0.25


@dataclass(frozen=True)
class Fleet:
    """What is measured."""

    num_desktops: int
    speedup: float
    schedule: str
    width: int
    height: int
    prompt_tokens: int

    @property
    def batch_episodes(self) -> int:
        """Episodes in a batch: one for each desktop, as a lock-step trainer has it."""
        return self.num_desktops // ROLLOUTS * ROLLOUTS


@dataclass
class Samples:
    """The state of the desktops over time, the time of processors, and what was drawn."""

    by_state: Counter[str] = field(default_factory=Counter)
    counted: list[dict[tuple[str, str], float]] = field(default_factory=list)
    """Metrics at the window's beginning and end."""
    cpu_s: list[dict[str, float]] = field(default_factory=list)
    actors_cpu_s: list[list[float]] = field(default_factory=list)
    acts: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        """Length of the window."""
        return self.at_s[1] - self.at_s[0]

    def delta(self, name: str) -> float:
        """Growth of a counter over the window, all labels together."""
        before, after = (sum(value for (key, _), value in counted.items() if key == name) for counted in self.counted)
        return after - before

    @property
    def modelled_s(self) -> float:
        """Desktop time that passed in drawn latencies and in the policy's actions."""
        acting_s = ACT_S * (self.acts[1] - self.acts[0])
        return self.delta("deskrl_actor_simulated_seconds_total") + acting_s

    @property
    def cores(self) -> dict[str, float]:
        """Processor cores in use: by each role, by what is modelled, and by all else on this machine."""
        before, after = self.cpu_s
        return {name: round((after[name] - before[name]) / self.elapsed_s, 3) for name in before}

    @property
    def busiest_actor_cores(self) -> float:
        """Of the actor process that used most."""
        before, after = self.actors_cpu_s
        return max(late - early for early, late in zip(before, after, strict=True)) / self.elapsed_s

    @property
    def steps_per_s(self) -> float:
        """Turns played, in real time."""
        return self.delta("deskrl_actor_env_steps_total") / self.elapsed_s

    @property
    def occupancy(self) -> float:
        """Share of the desktops' time that was not spent waiting."""
        return 1 - sum(self.by_state[state] for state in WAITING) / self.by_state.total()


class Rig:
    """All processes of one measurement."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet = fleet
        self.config = fleet_config(fleet, folder)
        act_s = ACT_S if fleet.schedule == "free" else BATCH_ACT_S
        self.policy = ModelledPolicy(self.config.inference.address, act_s / fleet.speedup, fleet.prompt_tokens, LENGTHS)
        self.replay = start_replay(self.config)
        self.learner = ModelledLearner(self.config, self.policy, LEARN_S / fleet.num_desktops / fleet.speedup)
        self.actors: list[Role] = start_actors(self.config)
        first = self.config.actor.metrics_port
        self._ports = range(first, first + len(self.actors))
        self.learner.start()

    def close(self) -> None:
        """End everything."""
        self.learner.close()
        for role in (*self.actors, self.replay):
            role.close()
        self.policy.close()

    def wait_until_playing(self) -> None:
        """Until every desktop has come up and begun an episode."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while read_metrics(self._ports).get(("deskrl_actor_reset_seconds_count", ""), 0) < self.fleet.num_desktops:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the desktops did not all come up")
            time.sleep(0.5)

    def mark(self, samples: Samples) -> None:
        """Note what has been counted by now."""
        samples.counted.append(read_metrics(self._ports))
        samples.at_s.append(time.monotonic())
        samples.acts.append(self.policy.num_acts)
        samples.actors_cpu_s.append([actor.cpu_s() for actor in self.actors])
        used_s = {
            "replay": self.replay.cpu_s(),
            "actors": sum(samples.actors_cpu_s[-1]),
            "modelled": time.process_time(),
        }
        machine = psutil.cpu_times()
        others_s = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
        samples.cpu_s.append({**used_s, "others": others_s - sum(used_s.values())})

    @contextmanager
    def sampling(self, samples: Samples) -> Iterator[None]:
        """Sample the desktops' states while this lasts."""
        over = threading.Event()

        def sample() -> None:
            while not over.wait(_SAMPLE_EVERY_S):
                for (name, label), value in read_metrics(self._ports).items():
                    if name == "deskrl_actor_desktops":
                        samples.by_state[label] += int(value)

        thread = threading.Thread(target=sample)
        self.mark(samples)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.mark(samples)


@dataclass(frozen=True)
class Measured:
    """One schedule, measured."""

    fleet: Fleet
    updates: list[Update]
    """The one that the window begins with, and all in it."""
    samples: Samples

    @property
    def episodes_per_min(self) -> float:
        """Learnt from, in the desktops' own time."""
        elapsed_s = (self.updates[-1].ended_s - self.updates[0].ended_s) * self.fleet.speedup
        learnt = sum(update.num_episodes - update.num_dropped.total() for update in self.updates[1:])
        return 60 * learnt / elapsed_s

    @property
    def bound_per_min(self) -> float:
        """What the latencies drawn in the window allow if nothing waits: desktops always busy, or the learner."""
        busy_s = self.samples.modelled_s / self.samples.delta("deskrl_actor_episodes_total")
        return 60 * min(self.fleet.num_desktops / busy_s, self.fleet.num_desktops / LEARN_S)

    @property
    def dropped_share(self) -> float:
        """Finished episodes that were not learnt from."""
        return sum(update.num_dropped.total() for update in self.updates[1:]) / sum(
            update.num_episodes for update in self.updates[1:]
        )

    @property
    def waited_share(self) -> float:
        """Of the learner's time, what it waited for batches."""
        elapsed_s = self.updates[-1].ended_s - self.updates[0].ended_s
        return sum(update.waited_s for update in self.updates[1:]) / elapsed_s


def fleet_config(fleet: Fleet, folder: Path) -> RunConfig:
    """The run's configuration."""
    per_actor = max(64, -(-fleet.num_desktops // 8))
    num_actors = -(-fleet.num_desktops // per_actor)
    return make_config(
        folder,
        free_ports(3 + num_actors),
        desktop={
            "num_envs": fleet.num_desktops,
            "width": fleet.width,
            "height": fleet.height,
            "simulated": {"time_scale": 1 / fleet.speedup, "luck": 0.5},
        },
        tasks={"rollouts": ROLLOUTS, "max_steps": LENGTHS.longest},
        actor={"desktops_per_actor": per_actor},
        replay={"schedule": fleet.schedule},
        learner={
            "grpo": {
                "num_updates": 10_000,
                "groups_per_batch": fleet.batch_episodes // ROLLOUTS,
                "max_staleness": MAX_STALENESS if fleet.schedule == "free" else 0,
                "groups_without_spread": "keep",
            }
        },
    )


def measure(fleet: Fleet, folder: Path, skipped: int, counted: int) -> Measured:
    """Run a fleet for some updates that count, after some that do not."""
    rig = Rig(fleet, folder)
    try:
        rig.learner.wait_for(skipped, TIMEOUT_S)
        samples = Samples()
        with rig.sampling(samples):
            rig.learner.wait_for(skipped + counted, TIMEOUT_S)
        return Measured(fleet, rig.learner.updates[skipped - 1 : skipped + counted], samples)
    finally:
        rig.close()


def watch(fleet: Fleet, folder: Path, window_s: float) -> Samples:
    """Run a fleet for so long, once all desktops play; how it stands with its updates is of no account."""
    rig = Rig(fleet, folder)
    try:
        rig.wait_until_playing()
        samples = Samples()
        with rig.sampling(samples):
            time.sleep(window_s)
        return samples
    finally:
        rig.close()
