"""How much of a fleet's time deskrl uses: free running against lock-step, on the same simulated desktops.

Real are the replay service and the actors (processes of their own: leases, episode streams, heartbeats, pacing) and
the learner's way of planning, taking and committing batches. Modelled are the desktops (`desktop.provider =
"simulated"`, latencies as configured by default), the policy (5 s an action; 8 s for a batch in lock-step) and the
learner (150 s for 256 episodes). All of this time passes `--speedup` times faster than stated (JSON: `time_scale`), so
that deskrl's own work weighs as many times more than it would on a real fleet.

Both schedules are measured from the end of one update to the end of a later one, the first few left out. In JSON:

- `ratio`: episodes a minute, free running over lock-step. Lock-step (`replay.schedule`) waits for the slowest of all
  at each step, hangs included, and has the learner take its turn.
- `bound_share`: episodes a minute over the bound, which is what the drawn latencies allow if nothing ever waits: all
  desktops busy all the time with resets, actions, evaluations (as the actors count what was drawn in the same window)
  and with the policy's time for each action; or the learner's pace, where that is less.
- `ratio_to_ideal`: the same episodes a minute over those of a lock-step without any work of deskrl's own, drawn here
  from the same distributions: what lock-step could reach at best.
- `occupancy`: share of the desktops' time in which they reset, act or are evaluated, sampled; the rest is waiting for
  work.
- `dropped_share`: episodes finished and not learnt from; `max_staleness`: of any token when its batch was taken.

With `--load`, free running only, time passing twice as fast again and again, until the desktops spend less than 90 %
of it in what is modelled (`busy_share`): what saturates first, and at which rate. The learner's pace grows with the
fleet here, so that it is not what is measured. `cpu_ms_per_step` is each role's; one process can use one core.

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

from fleet_rig import (
    BATCH_ACT_S,
    LEARN_S,
    LENGTHS,
    MAX_STALENESS,
    Fleet,
    Measured,
    Samples,
    measure,
    watch,
)

from deskrl.actor.desktops.simulated import Latencies
from deskrl.core.config import SimulatedConfig

MEAN_STEPS_PER_S = 0.07
"""Turns of one desktop that never waits, about; where the search for the limit begins follows from it."""
FIRST_STEPS_PER_S = 70.0
"""Time never passes slower than stated, so a large fleet begins with more."""
SATURATED_BELOW = 0.9
_IDEAL_ROUNDS = 100


def ideal_lock_step_per_min(num_desktops: int) -> float:
    """Episodes a minute of lock-step if nothing but the drawn latencies takes time."""
    random = Random(0)
    latencies = Latencies(SimulatedConfig(), random)
    rounds_s = []
    for _ in range(_IDEAL_ROUNDS):
        turns = [LENGTHS.draw(random.getrandbits(32)) for _ in range(num_desktops)]
        actions = [num - 1 for num in turns]  # the last turn says that it has finished
        round_s = max(latencies.reset_s() for _ in turns) + max(latencies.evaluation_s() for _ in turns)
        for turn in range(max(turns)):
            acting = [latencies.action_s() for num in actions if num > turn]
            round_s += BATCH_ACT_S + max(acting, default=0.0)
        rounds_s.append(round_s + LEARN_S)
    return 60 * num_desktops / fmean(rounds_s)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Free running against lock-step."""
    screen = (options.width, options.height, options.prompt_tokens)
    free = measure(Fleet(options.desktops, options.speedup, "free", *screen), folder, 2, options.updates)
    print(_summary(free), file=sys.stderr, flush=True)
    locked = measure(Fleet(options.desktops, options.speedup, "lock_step", *screen), folder, 1, options.rounds)
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
    """Ever faster, until deskrl's own work no longer fits between what is modelled."""
    speedup = max(1.0, FIRST_STEPS_PER_S / (MEAN_STEPS_PER_S * options.desktops))
    stages: list[dict[str, object]] = []
    while True:
        fleet = Fleet(options.desktops, speedup, "free", options.width, options.height, options.prompt_tokens)
        samples = watch(fleet, folder, options.window)
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
        if busy_share < SATURATED_BELOW:
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


def _first_saturated(samples: Samples) -> str:
    """What has no processor time left: one role's process, or the machine and who uses most of it."""
    if samples.cores["replay"] > SATURATED_BELOW:
        return "the replay process"
    if samples.busiest_actor_cores > SATURATED_BELOW:
        return "an actor process"
    own = {name: used for name, used in samples.cores.items() if name != "others"}
    return f"the machine's processors, of which {max(own, key=lambda name: own[name])} used most"


def _summary(measured: Measured) -> str:
    states = {
        name: round(num / measured.samples.by_state.total(), 4) for name, num in measured.samples.by_state.items()
    }
    return (
        f"{measured.fleet.schedule}: {measured.episodes_per_min:.1f} episodes/min, bound {measured.bound_per_min:.1f}, "
        f"cores {measured.samples.cores}, {measured.samples.steps_per_s:.0f} steps/s, states {states}"
    )


def main() -> None:
    """Measure, print one line."""
    parser = argparse.ArgumentParser(description="a fleet of simulated desktops: free running against lock-step")
    parser.add_argument("--desktops", type=int, default=256)
    parser.add_argument("--speedup", type=float, default=10.0, help="how much faster than stated time passes")
    parser.add_argument("--updates", type=int, default=6, help="that count, free running; two more come before")
    parser.add_argument("--rounds", type=int, default=3, help="that count, in lock-step; one more comes before")
    parser.add_argument("--width", type=int, default=280)
    parser.add_argument("--height", type=int, default=168)
    parser.add_argument(
        "--prompt-tokens", type=int, default=6000, help="prompt ids of each step: five screenshots' worth"
    )
    parser.add_argument("--load", action="store_true", help="find what saturates")
    parser.add_argument("--window", type=float, default=40.0, help="seconds of each stage of --load")
    options = parser.parse_args()
    bench = saturate if options.load else compare
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        print(json.dumps(bench(options, Path(folder))))


if __name__ == "__main__":
    main()
