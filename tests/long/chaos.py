"""Faults at random moments of running jobs, one job after another, until there were as many as asked for.

    python tests/long/chaos.py [--seed 1] [--faults 500] [--updates 12] [--runs FOLDER]

Each job ends by itself after so many updates and is judged then. What is found is printed with the seed of its job and
the index of each fault, its folder is kept, and the exit status is 1. A job is drawn again by `--seed S --job N`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from chaos_kit.faults import left_out
from chaos_kit.job import build_model
from chaos_kit.run import Outcome, run_job

from deskrl.actor.desktops.packages import missing_packages

EMBEDDED_EVERY = 4
"""Every so manieth job has real desktops, which can be killed and stopped too."""


def storms(seed: int, num_faults: int, num_updates: int, runs: Path, first_job: int = 0) -> Iterator[Outcome]:
    """Job after job, until there were so many faults."""
    model = build_model(runs / "model")
    number = first_job
    while num_faults > 0:
        provider = "embedded" if number % EMBEDDED_EVERY == 1 and not missing_packages() else "simulated"
        outcome = run_job(runs, f"{seed}-{number}", num_updates, num_faults, model, provider)
        num_faults -= len(outcome.done)
        number += 1
        yield outcome


def main() -> int:
    """Run, tell, judge."""
    parser = argparse.ArgumentParser(description="faults at random moments of running jobs, from a seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--updates", type=int, default=12, help="of each job")
    parser.add_argument("--job", type=int, default=0, help="the job to begin with, to draw its faults once more")
    parser.add_argument("--runs", type=Path, help="where jobs are run, and what is found is kept; default: temporary")
    options = parser.parse_args()
    runs = options.runs or Path(tempfile.mkdtemp(prefix="deskrl-chaos-"))
    for kind, program in left_out().items():
        print(f"no {kind}: {program} is not installed")
    num_done, num_wrong = 0, 0
    for outcome in storms(options.seed, options.faults, options.updates, runs, options.job):
        num_done += len(outcome.done)
        num_wrong += len(outcome.wrong)
        print(outcome.report(), flush=True)
    print(f"{num_done} faults, {num_wrong} findings" + (f"; kept in {runs}" if num_wrong else ""))
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
