"""Benchmark of the recovery time of a job after each kind of fault, against its undisturbed progress intervals.

The job (tests/kit/chaos_kit/job.py) has replay, a learner, two actors on simulated desktops, and inference without
vLLM, which would add half a minute to each start. Faults are injected one at a time, all kinds in each round, and only
after actors and learner have made progress since the last one. Killed processes are restarted at once.

Prints progress, then one JSON line:

- `recovery_s`: seconds from the end of the fault (kill, SIGCONT, network or disk space restored) to the next progress
  event, median of the rounds. The event is the one that the fault prevents: the next acknowledged episode of the
  actor for faults of one actor, the next update for faults of the learner or its connections, and the next
  acknowledged episode of any actor for all others.
- `undisturbed_s`: seconds between two such events of the same job without faults, median.
- `ratio`: recovery divided by undisturbed time, median over the faults; 1 means no delay.

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

from chaos_kit.faults import Fault, inject, kinds_for
from chaos_kit.job import ACTORS, ChaosJob, build_model

FAULT_DURATION_S = 2.0
FAULTS = (
    *(Fault("kill", role, 0.0, 0.0) for role in ("replay", "inference", "actor-0")),
    Fault("kill_learner", "learner", 0.0, 0.0),
    *(Fault("stop", role, FAULT_DURATION_S, 0.0) for role in ("replay", "inference", "actor-0", "learner")),
    Fault("delay", "actor~replay", FAULT_DURATION_S, 0.2),
    *(
        Fault("partition", link, FAULT_DURATION_S, 0.0)
        for link in ("actor~replay", "actor~inference", "learner~replay")
    ),
    *(Fault("reset", link, FAULT_DURATION_S, 0.0) for link in ("actor~replay", "actor~inference", "learner~replay")),
    Fault("corrupt", "actor~replay", FAULT_DURATION_S, 0.0),
    Fault("full_disk", "replay", FAULT_DURATION_S, 0.0),
    Fault("slow_disk", "replay", FAULT_DURATION_S, 0.1),
    Fault("clock_jump", "replay", FAULT_DURATION_S, 3600.0),
    Fault("cut_short", "screenshots", 0.0, 0.5),
)
_NUM_UPDATES = 1_000_000
"""More updates than the benchmark has time for; the job is stopped at the end."""
_POLL_S = 0.05
_TIMEOUT_S = 300.0


class ProgressEvents:
    """Times of the progress events of a job, on the monotonic clock.

    Args:
        job: running job.
    """

    def __init__(self, job: ChaosJob) -> None:
        self._job = job
        self._updates_s: list[float] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        """Stop watching the job."""
        self._closed.set()
        self._thread.join()

    def times_s(self, kind: str) -> list[float]:
        """Return the times of all events of a kind: `episodes`, `updates` or the name of an actor."""
        if kind == "updates":
            return list(self._updates_s)
        if kind in ACTORS:
            return [result.seen_s for result in self._job.actor_logs[ACTORS.index(kind)].acknowledged]
        return [result.seen_s for result in self._job.acknowledged]

    def wait_for(self, kinds: Iterable[str], after_s: float) -> list[float]:
        """Wait for the first event of each kind after `after_s`, and return their times."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            first = [next((at_s for at_s in self.times_s(kind) if at_s > after_s), None) for kind in kinds]
            if all(at_s is not None for at_s in first):
                return [at_s for at_s in first if at_s is not None]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no progress for {_TIMEOUT_S:.0f} s; logs in {self._job.folder.logs}")
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            num_new = len(list(self._job.folder.read_metrics("update"))) - len(self._updates_s)
            self._updates_s += [time.monotonic()] * num_new


def affected_event(fault: Fault) -> str:
    """Return the kind of progress event that a fault prevents."""
    if fault.target in ACTORS:
        return fault.target
    return "updates" if fault.target.startswith("learner") else "episodes"


def measure(job: ChaosJob, faults: Sequence[Fault], rounds: int, window_s: float) -> dict[str, object]:
    """Measure the undisturbed intervals and the faults of all rounds, and return the result."""
    recoveries_s: defaultdict[Fault, list[float]] = defaultdict(list)
    undisturbed_gaps_s: defaultdict[str, list[float]] = defaultdict(list)
    names = ("episodes", "updates", *ACTORS)
    events = ProgressEvents(job)
    try:
        for _ in range(rounds):
            started_s = time.monotonic()
            time.sleep(window_s)
            events.wait_for(names, max(events.wait_for(names, started_s)))  # at least two events of each kind
            for name in names:
                undisturbed_gaps_s[name] += [
                    late - early for early, late in pairwise(events.times_s(name)) if early > started_s
                ]
            for fault in faults:
                inject(job, fault)
                ended_s = time.monotonic()
                (progress_s,) = events.wait_for([affected_event(fault)], ended_s)
                recoveries_s[fault].append(progress_s - ended_s)
                print(f"{fault}: {progress_s - ended_s:.2f} s", file=sys.stderr, flush=True)
                events.wait_for(names, progress_s)
    finally:
        events.close()
    undisturbed_s = {name: median(gaps) for name, gaps in undisturbed_gaps_s.items()}
    recovery_s = {fault: median(times) for fault, times in recoveries_s.items()}
    return {
        "bench": "recovery",
        "ratio": round(
            median(time_s / undisturbed_s[affected_event(fault)] for fault, time_s in recovery_s.items()), 2
        ),
        "recovery_s": {f"{fault.kind} {fault.target}": round(time_s, 2) for fault, time_s in recovery_s.items()},
        "undisturbed_s": {name: round(gap_s, 2) for name, gap_s in undisturbed_s.items()},
        "rounds": rounds,
        "fault_s": FAULT_DURATION_S,
        "machine_cores": os.cpu_count(),
    }


def main() -> None:
    """Parse the arguments, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=20.0, help="seconds without a fault before each round")
    parser.add_argument(
        "--only", nargs="+", default=sorted({fault.kind for fault in FAULTS}), help="kinds of faults; default: all"
    )
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
