"""Benchmark of the episode throughput of a fleet: asynchronous against lock-step, on the same simulated desktops.

The replay service, the actors (separate processes) and the learner's planning, taking and committing of batches are
real. The desktops (`desktop.provider = "simulated"` with default latencies), the policy (5 s per action; 8 s per batch
of actions in lock-step) and the learner (150 s for 256 episodes) are modelled. Modelled time passes `--speedup` times
faster than real time (JSON: `time_scale`), so the overhead of deskrl weighs more than on a real fleet, by this factor.

Both schedules are measured from the end of one update to the end of a later one, after some warm-up updates. Prints
progress, then one JSON line:

- `ratio`: episodes per minute of the asynchronous schedule divided by those of lock-step. In lock-step
  (`replay.schedule`), every step waits for the slowest desktop, including hangs, and acting and training alternate.
- `bound_share`: episodes per minute divided by their upper bound. At the bound, all desktops are always busy with the
  drawn latencies (resets, actions, evaluations) and the policy's time per action, or the learner is always busy.
- `ratio_to_ideal`: episodes per minute divided by those of an ideal lock-step without any overhead, which is simulated
  here with the same distributions.
- `occupancy`: sampled share of desktop time spent in resets, actions and evaluations, not waiting for work.
- `dropped_share`: share of finished episodes that were not trained on; `max_staleness`: maximum staleness of any token
  when its batch was taken.

With `--load`, only the asynchronous schedule runs, and the speed of time doubles until the desktops spend less than
90 % of it in modelled latencies (`busy_share`). The output names the resource that saturates first and the step rate.
The learner's speed is proportional to the size of the fleet, so it is not the limit. `cpu_ms_per_step` is given by
role; one process can use one core.

    python tests/bench/fleet.py [--desktops 256] [--speedup 10] [--updates 6] [--rounds 3]
    python tests/bench/fleet.py --desktops 1000 --load [--window 40]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from fleet_measurement_kit import (
    BATCH_ACT_S,
    LEARN_S,
    LENGTHS,
    MAX_STALENESS,
    FleetMeasurement,
    FleetSamples,
    FleetSpec,
    measure_updates,
    sample_window,
)

from deskrl.actor.desktops.simulated import Latencies
from deskrl.core.config import SimulatedConfig

MEAN_STEPS_PER_S = 0.07
"""Approximate steps per second of one desktop that never waits; determines the first speedup of `--load`."""
FIRST_STEPS_PER_S = 70.0
"""Step rate at the first speedup of `--load`; higher for large fleets, as the speedup is at least 1."""
SATURATION_SHARE = 0.9
"""Busy share of desktops below which a fleet is saturated, and core use above which a process is."""
_IDEAL_ROUNDS = 100


def ideal_lock_step_per_min(num_desktops: int) -> float:
    """Return the episodes per minute of lock-step in which only the drawn latencies take time."""
    random = Random(0)
    latencies = Latencies(SimulatedConfig(), random)
    rounds_s = []
    for _ in range(_IDEAL_ROUNDS):
        lengths = [LENGTHS.draw(random.getrandbits(32)) for _ in range(num_desktops)]
        actions = [length - 1 for length in lengths]  # the last step only declares the end
        round_s = max(latencies.reset_s() for _ in lengths) + max(latencies.evaluation_s() for _ in lengths)
        for step in range(max(lengths)):
            acting = [latencies.action_s() for num in actions if num > step]
            round_s += BATCH_ACT_S + max(acting, default=0.0)
        rounds_s.append(round_s + LEARN_S)
    return 60 * num_desktops / fmean(rounds_s)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Measure both schedules and return the result."""
    screen = (options.width, options.height, options.prompt_tokens)
    free = measure_updates(
        FleetSpec(options.desktops, options.speedup, "asynchronous", *screen), folder, 2, options.updates
    )
    print(_summary(free), file=sys.stderr, flush=True)
    locked = measure_updates(
        FleetSpec(options.desktops, options.speedup, "lock_step", *screen), folder, 1, options.rounds
    )
    print(_summary(locked), file=sys.stderr, flush=True)
    return {
        "bench": "fleet",
        "ratio": round(free.episodes_per_min / locked.episodes_per_min, 2),
        "ratio_to_ideal": round(free.episodes_per_min / ideal_lock_step_per_min(options.desktops), 2),
        "desktops": options.desktops,
        "time_scale": 1 / options.speedup,
        "episodes_per_min": round(free.episodes_per_min, 2),
        "lock_step_per_min": round(locked.episodes_per_min, 2),
        "ideal_lock_step_per_min": round(ideal_lock_step_per_min(options.desktops), 2),
        "bound_per_min": round(free.bound_per_min, 2),
        "bound_share": round(free.episodes_per_min / free.bound_per_min, 4),
        "occupancy": round(free.samples.occupancy, 4),
        "lock_step_occupancy": round(locked.samples.occupancy, 4),
        "max_staleness": max(update.max_staleness for update in free.updates[1:]),
        "staleness_limit": MAX_STALENESS,
        "dropped_share": round(free.dropped_share, 4),
        "learner_waited_share": round(free.waited_share, 4),
        "cores": free.samples.cores,
        "steps_per_s": round(free.samples.steps_per_s, 1),
        "updates": options.updates,
        "rounds": options.rounds,
        "machine_cores": os.cpu_count(),
    }


def saturate(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Double the speed of time until the fleet is saturated, and return the result."""
    speedup = max(1.0, FIRST_STEPS_PER_S / (MEAN_STEPS_PER_S * options.desktops))
    stages: list[dict[str, object]] = []
    while True:
        fleet = FleetSpec(
            options.desktops, speedup, "asynchronous", options.width, options.height, options.prompt_tokens
        )
        samples = sample_window(fleet, folder, options.window)
        busy_share = samples.modelled_s / (options.desktops * samples.elapsed_s * speedup)
        stages.append(
            {
                "time_scale": round(1 / speedup, 3),
                "steps_per_s": round(samples.steps_per_s, 1),
                "busy_share": round(busy_share, 3),
                "cores": samples.cores,
                "busiest_actor_cores": round(samples.busiest_actor_cores, 3),
                "cpu_ms_per_step": {
                    name: round(1000 * used / samples.steps_per_s, 2)
                    for name, used in samples.cores.items()
                    if name != "others"
                },
            }
        )
        print(json.dumps(stages[-1]), file=sys.stderr, flush=True)
        if busy_share < SATURATION_SHARE:
            return {
                "bench": "fleet",
                "desktops": options.desktops,
                "saturated": _first_saturated(samples),
                "saturated_at_steps_per_s": stages[-1]["steps_per_s"],
                "kept_up_at_steps_per_s": stages[-2]["steps_per_s"] if len(stages) > 1 else 0.0,
                "stages": stages,
                "screenshot": [options.width, options.height],
                "prompt_tokens": options.prompt_tokens,
                "machine_cores": os.cpu_count(),
            }
        speedup *= 2


def _first_saturated(samples: FleetSamples) -> str:
    """Return what is saturated: the process of a role, or the CPUs of the machine with their main user."""
    if samples.cores["replay"] > SATURATION_SHARE:
        return "the replay process"
    if samples.busiest_actor_cores > SATURATION_SHARE:
        return "an actor process"
    own = {name: used for name, used in samples.cores.items() if name != "others"}
    return f"the CPUs of the machine, mostly used by {max(own, key=lambda name: own[name])}"


def _summary(measured: FleetMeasurement) -> str:
    states = {
        name: round(num / measured.samples.by_state.total(), 4) for name, num in measured.samples.by_state.items()
    }
    return (
        f"{measured.fleet.schedule}: {measured.episodes_per_min:.1f} episodes/min, bound {measured.bound_per_min:.1f}, "
        f"cores {measured.samples.cores}, {measured.samples.steps_per_s:.0f} steps/s, states {states}"
    )


def main() -> None:
    """Parse the arguments, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--desktops", type=int, default=256)
    parser.add_argument("--speedup", type=float, default=10.0, help="factor by which modelled time passes faster")
    parser.add_argument("--updates", type=int, default=6, help="measured asynchronous updates, after two for warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="measured lock-step updates, after one for warm-up")
    parser.add_argument("--width", type=int, default=280)
    parser.add_argument("--height", type=int, default=168)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=6000,
        help="prompt ids per step; the default is typical of five screenshots",
    )
    parser.add_argument("--load", action="store_true", help="find the load that saturates")
    parser.add_argument("--window", type=float, default=40.0, help="seconds per stage of --load")
    options = parser.parse_args()
    bench = saturate if options.load else compare
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        print(json.dumps(bench(options, Path(folder))))


if __name__ == "__main__":
    main()
