"""Injects random faults into running jobs, one job after another, until a given number of faults is reached.

    python tests/long/chaos.py [--seed 1] [--faults 500] [--updates 12] [--runs FOLDER]

Each job finishes after a given number of updates, and its record is then checked. Violations are printed with the seed
of the job and the index of each fault, the run directory is kept, and the exit status is 1. `--seed S --job N` repeats
the faults of a job.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from chaos_kit.fault_injector import Outcome, run_job
from chaos_kit.faults import unavailable_kinds
from chaos_kit.job import build_model

from deskrl.actor.desktops.debian_packages import missing_packages

EMBEDDED_EVERY = 4
"""Interval of the jobs with embedded desktops, into which further kinds of faults are injected."""
VLLM_EVERY = 8
"""Interval of the jobs with vLLM, whose engine process is killed as well."""


def run_jobs(seed: int, num_faults: int, num_updates: int, runs: Path, first_job: int = 0) -> Iterator[Outcome]:
    """Run jobs until `num_faults` faults have been injected; yield the outcome of each."""
    model = build_model(runs / "model")
    number = first_job
    while num_faults > 0:
        provider = "embedded" if number % EMBEDDED_EVERY == 1 and not missing_packages() else "simulated"
        with_vllm = number % VLLM_EVERY == 3
        outcome = run_job(runs, f"{seed}-{number}", num_updates, num_faults, model, provider, with_vllm=with_vllm)
        num_faults -= len(outcome.faults)
        number += 1
        yield outcome


def main() -> int:
    """Run all jobs, print their outcomes and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--updates", type=int, default=12, help="updates per job")
    parser.add_argument("--job", type=int, default=0, help="number of the first job, to repeat its faults")
    parser.add_argument("--runs", type=Path, help="directory of runs; default: a temporary folder")
    options = parser.parse_args()
    runs = options.runs or Path(tempfile.mkdtemp(prefix="deskrl-chaos-"))
    for kind, program in unavailable_kinds().items():
        print(f"faults of kind {kind} are not injected: {program} is not installed")
    num_injected, num_violations = 0, 0
    for outcome in run_jobs(options.seed, options.faults, options.updates, runs, options.job):
        num_injected += len(outcome.faults)
        num_violations += len(outcome.violations)
        print(outcome.report(), flush=True)
    print(f"{num_injected} faults, {num_violations} violations" + (f"; runs kept in {runs}" if num_violations else ""))
    return int(num_violations > 0)


if __name__ == "__main__":
    sys.exit(main())
