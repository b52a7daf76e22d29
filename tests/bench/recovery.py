"""How long a job takes to get over a fault, kind by kind, against how long it goes without news when there is none.

One job as in the chaos program (tests/kit/chaos_kit/job.py): replay, learner, two actors on simulated desktops, and an
inference service whose engine is not vLLM, which would need half a minute more to start. Faults are done to it one at a
time, in turns, all kinds in each round; the next waits until acting and learning have both gone on. Whoever is killed
is started again at once.

- `recovery_s`: from the end of the fault (a kill, SIGCONT, the network back, space on the disk) to the next sign of
  life, median of the rounds. The sign is what the fault had stopped: the next acknowledged episode of that actor, where
  it was done to one actor; the next update, where it was done to the learner or its connections; else the next
  acknowledged episode of any actor.
- `undisturbed_s`: between two such signs in the same job before the first fault and after each round, median.
- `ratio`: recovery over undisturbed, median of all kinds: 1 is a fault that nobody would notice once it is over.

    python tests/bench/recovery.py [--rounds 5] [--window 20] [--only kill stop]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from chaos_kit.faults import Fault, inflict, kinds_for
from chaos_kit.job import ACTORS, ChaosJob, build_model

LENGTH_S = 2.0
FAULTS = (
    *(Fault("kill", role, 0.0, 0.0) for role in ("replay", "inference", "actor-0")),
    Fault("kill_learner", "learner", 0.0, 0.0),
    *(Fault("stop", role, LENGTH_S, 0.0) for role in ("replay", "inference", "actor-0", "learner")),
    Fault("delay", "actor~replay", LENGTH_S, 0.2),
    *(Fault("partition", link, LENGTH_S, 0.0) for link in ("actor~replay", "actor~inference", "learner~replay")),
    *(Fault("reset", link, LENGTH_S, 0.0) for link in ("actor~replay", "actor~inference", "learner~replay")),
    Fault("corrupt", "actor~replay", LENGTH_S, 0.0),
    Fault("full_disk", "replay", LENGTH_S, 0.0),
    Fault("slow_disk", "replay", LENGTH_S, 0.1),
    Fault("clock_jump", "replay", LENGTH_S, 3600.0),
    Fault("cut_short", "screenshots", 0.0, 0.5),
)
_NUM_UPDATES = 1_000_000
"""More than there is time for: the job is ended, it does not end."""
_POLL_S = 0.05
_PATIENCE_S = 300.0


class Signs:
    """When a job showed life: seconds on the monotonic clock, by who did.

    Args:
        job: that runs.
    """

    def __init__(self, job: ChaosJob) -> None:
        self._job = job
        self._updates_s: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def of(self, sign: str) -> list[float]:
        """All of one kind, `episodes`, `updates` or the name of an actor."""
        if sign == "updates":
            return list(self._updates_s)
        if sign in ACTORS:
            return [one.seen_s for one in self._job.actor_logs[ACTORS.index(sign)].acknowledged]
        return [one.seen_s for one in self._job.acknowledged]

    def wait_for(self, signs: Iterable[str], after_s: float) -> list[float]:
        """The first of each after a moment."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            first = [next((at_s for at_s in self.of(sign) if at_s > after_s), None) for sign in signs]
            if all(at_s is not None for at_s in first):
                return [at_s for at_s in first if at_s is not None]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no sign of life for {_PATIENCE_S:.0f} s; logs in {self._job.folder.logs}")
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            num_new = len(list(self._job.folder.read_metrics("update"))) - len(self._updates_s)
            self._updates_s += [time.monotonic()] * num_new


def sign_of(fault: Fault) -> str:
    """What a fault stops."""
    if fault.target in ACTORS:
        return fault.target
    return "updates" if fault.target.startswith("learner") else "episodes"


def measure(job: ChaosJob, faults: Sequence[Fault], rounds: int, window_s: float) -> dict[str, object]:
    """Faults in turns, and the quiet before each round."""
    recoveries_s: defaultdict[Fault, list[float]] = defaultdict(list)
    quiet_s: defaultdict[str, list[float]] = defaultdict(list)
    names = ("episodes", "updates", *ACTORS)
    signs = Signs(job)
    try:
        for _ in range(rounds):
            begun_s = time.monotonic()
            time.sleep(window_s)
            signs.wait_for(names, max(signs.wait_for(names, begun_s)))  # two of each at the least
            for name in names:
                quiet_s[name] += [late - early for early, late in pairwise(signs.of(name)) if early > begun_s]
            for fault in faults:
                inflict(job, fault)
                ended_s = time.monotonic()
                (alive_s,) = signs.wait_for([sign_of(fault)], ended_s)
                recoveries_s[fault].append(alive_s - ended_s)
                print(f"{fault}: {alive_s - ended_s:.2f} s", file=sys.stderr, flush=True)
                signs.wait_for(names, alive_s)
    finally:
        signs.close()
    undisturbed_s = {name: median(gaps) for name, gaps in quiet_s.items()}
    recovery_s = {fault: median(times) for fault, times in recoveries_s.items()}
    return {
        "bench": "recovery",
        "ratio": round(median(time_s / undisturbed_s[sign_of(fault)] for fault, time_s in recovery_s.items()), 2),
        "recovery_s": {f"{fault.kind} {fault.target}": round(time_s, 2) for fault, time_s in recovery_s.items()},
        "undisturbed_s": {name: round(gap_s, 2) for name, gap_s in undisturbed_s.items()},
        "rounds": rounds,
        "fault_s": LENGTH_S,
        "machine_cores": os.cpu_count(),
    }


def main() -> None:
    """Measure, print one line."""
    parser = argparse.ArgumentParser(description="how long a job takes to get over a fault, kind by kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=20.0, help="seconds without a fault before each round")
    parser.add_argument("--only", nargs="+", default=sorted({fault.kind for fault in FAULTS}), help="these kinds")
    options = parser.parse_args()
    kinds = kinds_for("simulated").keys() & set(options.only)
    faults = [fault for fault in FAULTS if fault.kind in kinds]
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        job = ChaosJob(Path(folder), "recovery", _NUM_UPDATES, 1, build_model(Path(folder) / "model"))
        try:
            job.wait_until_running()
            result = measure(job, faults, options.rounds, options.window)
        finally:
            job.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
