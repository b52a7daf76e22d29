"""Measures a fleet of simulated desktops: starts all processes and samples their metrics over a window of time.

Names that end in `_s` are real seconds. Rates per minute are in the simulated time of the desktops, which passes
`speedup` times faster.
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
from modelled_roles_kit import (
    EpisodeLengths,
    FleetProcess,
    ModelledLearner,
    ModelledPolicy,
    Update,
    make_config,
    read_metrics,
    start_actors,
    start_replay,
)
from ports_kit import free_ports

from deskrl.core.config import RunConfig

ACT_S, BATCH_ACT_S = 5.0, 8.0
"""Modelled seconds of one action: sampled alone, and in a batch of all desktops."""
LEARN_S = 150.0
"""Modelled seconds of training on a batch with one episode per desktop."""
ROLLOUTS = 8
MAX_STALENESS = 4
LENGTHS = EpisodeLengths()
TIMEOUT_S = 3600.0
WAITING_STATES = ("idle", "replacing", "waiting_for_others")
"""States in which a desktop does no work."""
_SAMPLE_INTERVAL_S = 0.25


@dataclass(frozen=True)
class FleetSpec:
    """Fleet to measure."""

    num_desktops: int
    speedup: float
    """Factor by which simulated time passes faster than real time."""
    schedule: str
    """Value of `replay.schedule`: `asynchronous` or `lock_step`."""
    width: int
    height: int
    prompt_tokens: int

    @property
    def batch_episodes(self) -> int:
        """Episodes per batch: one per desktop, as in a lock-step trainer."""
        return self.num_desktops // ROLLOUTS * ROLLOUTS


@dataclass
class FleetSamples:
    """Samples of desktop states, and counters at the start and end of a window."""

    by_state: Counter[str] = field(default_factory=Counter)
    """Number of samples by desktop state."""
    counters: list[dict[tuple[str, str], float]] = field(default_factory=list)
    """Prometheus samples of the actors at the start and end of the window."""
    cpu_s: list[dict[str, float]] = field(default_factory=list)
    """CPU seconds by role, at the start and end."""
    actors_cpu_s: list[list[float]] = field(default_factory=list)
    """CPU seconds of each actor process, at the start and end."""
    num_acts: list[int] = field(default_factory=list)
    """Number of actions of the policy, at the start and end."""
    times_s: list[float] = field(default_factory=list)
    """Monotonic time of the start and end."""

    @property
    def elapsed_s(self) -> float:
        """Length of the window in seconds."""
        return self.times_s[1] - self.times_s[0]

    def delta(self, name: str) -> float:
        """Return the growth of a counter over the window, summed over labels."""
        before, after = (sum(value for (key, _), value in sample.items() if key == name) for sample in self.counters)
        return after - before

    @property
    def modelled_s(self) -> float:
        """Simulated seconds that desktops spent in drawn latencies and in actions of the policy."""
        acting_s = ACT_S * (self.num_acts[1] - self.num_acts[0])
        return self.delta("deskrl_actor_simulated_seconds_total") + acting_s

    @property
    def cores(self) -> dict[str, float]:
        """CPU cores in use by replay, actors, modelled roles, and other processes of this machine."""
        before, after = self.cpu_s
        return {name: round((after[name] - before[name]) / self.elapsed_s, 3) for name in before}

    @property
    def busiest_actor_cores(self) -> float:
        """CPU cores in use by the busiest actor process."""
        before, after = self.actors_cpu_s
        return max(late - early for early, late in zip(before, after, strict=True)) / self.elapsed_s

    @property
    def steps_per_s(self) -> float:
        """Environment steps per real second."""
        return self.delta("deskrl_actor_env_steps_total") / self.elapsed_s

    @property
    def occupancy(self) -> float:
        """Share of desktop time that was not spent waiting."""
        return 1 - sum(self.by_state[state] for state in WAITING_STATES) / self.by_state.total()


class FleetHarness:
    """All processes of one measurement.

    Args:
        fleet: fleet to measure.
        folder: directory of runs.
    """

    def __init__(self, fleet: FleetSpec, folder: Path) -> None:
        self.fleet = fleet
        self.config = fleet_config(fleet, folder)
        act_s = ACT_S if fleet.schedule == "asynchronous" else BATCH_ACT_S
        self.policy = ModelledPolicy(self.config.inference.address, act_s / fleet.speedup, fleet.prompt_tokens, LENGTHS)
        self.replay = start_replay(self.config)
        self.learner = ModelledLearner(self.config, self.policy, LEARN_S / fleet.num_desktops / fleet.speedup)
        self.actors: list[FleetProcess] = start_actors(self.config)
        first = self.config.actor.metrics_port
        self._ports = range(first, first + len(self.actors))
        self.learner.start()

    def close(self) -> None:
        """Stop all processes."""
        self.learner.close()
        for role in (*self.actors, self.replay):
            role.close()
        self.policy.close()

    def wait_until_busy(self) -> None:
        """Wait until every desktop has started and begun an episode."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while read_metrics(self._ports).get(("deskrl_actor_reset_seconds_count", ""), 0) < self.fleet.num_desktops:
            if time.monotonic() > deadline_s:
                raise TimeoutError("not all desktops started")
            time.sleep(0.5)

    def record_counters(self, samples: FleetSamples) -> None:
        """Append the present values of all counters."""
        samples.counters.append(read_metrics(self._ports))
        samples.times_s.append(time.monotonic())
        samples.num_acts.append(self.policy.num_acts)
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
    def sampling(self, samples: FleetSamples) -> Iterator[None]:
        """Sample the states of the desktops until the end of the block."""
        is_over = threading.Event()

        def sample() -> None:
            while not is_over.wait(_SAMPLE_INTERVAL_S):
                for (name, label), value in read_metrics(self._ports).items():
                    if name == "deskrl_actor_desktops":
                        samples.by_state[label] += int(value)

        thread = threading.Thread(target=sample)
        self.record_counters(samples)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self.record_counters(samples)


@dataclass(frozen=True)
class FleetMeasurement:
    """Measurement of one fleet."""

    fleet: FleetSpec
    updates: list[Update]
    """Update at whose end the window starts, followed by all updates in the window."""
    samples: FleetSamples

    @property
    def episodes_per_min(self) -> float:
        """Episodes trained on per minute of simulated time."""
        elapsed_s = (self.updates[-1].ended_s - self.updates[0].ended_s) * self.fleet.speedup
        num_trained = sum(update.num_episodes - update.num_dropped.total() for update in self.updates[1:])
        return 60 * num_trained / elapsed_s

    @property
    def bound_per_min(self) -> float:
        """Upper bound on `episodes_per_min`: all desktops, or the learner, are always busy with the drawn latencies."""
        busy_s = self.samples.modelled_s / self.samples.delta("deskrl_actor_episodes_total")
        return 60 * min(self.fleet.num_desktops / busy_s, self.fleet.num_desktops / LEARN_S)

    @property
    def dropped_share(self) -> float:
        """Share of finished episodes that were not trained on."""
        return sum(update.num_dropped.total() for update in self.updates[1:]) / sum(
            update.num_episodes for update in self.updates[1:]
        )

    @property
    def waited_share(self) -> float:
        """Share of time for which the learner waited for batches."""
        elapsed_s = self.updates[-1].ended_s - self.updates[0].ended_s
        return sum(update.waited_s for update in self.updates[1:]) / elapsed_s


def fleet_config(fleet: FleetSpec, folder: Path) -> RunConfig:
    """Return the configuration of the run."""
    per_actor = max(64, -(-fleet.num_desktops // 8))
    num_actors = -(-fleet.num_desktops // per_actor)
    return make_config(
        folder,
        free_ports(3 + num_actors),
        desktop={
            "num_envs": fleet.num_desktops,
            "width": fleet.width,
            "height": fleet.height,
            "simulated": {"time_scale": 1 / fleet.speedup, "random_success_rate": 0.5},
        },
        tasks={"num_rollouts": ROLLOUTS, "max_steps": LENGTHS.longest},
        actor={"desktops_per_actor": per_actor},
        replay={"schedule": fleet.schedule},
        learner={
            "grpo": {
                "num_updates": 10_000,
                "groups_per_batch": fleet.batch_episodes // ROLLOUTS,
                "max_staleness": MAX_STALENESS if fleet.schedule == "asynchronous" else 0,
                "zero_variance_groups": "keep",
            }
        },
    )


def measure_updates(fleet: FleetSpec, folder: Path, num_skipped: int, num_measured: int) -> FleetMeasurement:
    """Run a fleet and measure `num_measured` updates after the first `num_skipped`."""
    harness = FleetHarness(fleet, folder)
    try:
        harness.learner.wait_for(num_skipped, TIMEOUT_S)
        samples = FleetSamples()
        with harness.sampling(samples):
            harness.learner.wait_for(num_skipped + num_measured, TIMEOUT_S)
        return FleetMeasurement(fleet, harness.learner.updates[num_skipped - 1 : num_skipped + num_measured], samples)
    finally:
        harness.close()


def sample_window(fleet: FleetSpec, folder: Path, window_s: float) -> FleetSamples:
    """Run a fleet and sample it for `window_s` seconds after all desktops are busy, whatever its updates."""
    harness = FleetHarness(fleet, folder)
    try:
        harness.wait_until_busy()
        samples = FleetSamples()
        with harness.sampling(samples):
            time.sleep(window_s)
        return samples
    finally:
        harness.close()
