"""Faults at random moments of running jobs, from a seed, and what has to be true after each job.

Faults fall one after another at random distances, so that some fall on a role that has not got over the last one, until
the job has ended by itself. The same seed draws the same faults; what they meet depends on the machine. Knows the order
of things; faults, jobs and rules are the neighbours'.
"""

from __future__ import annotations

import shutil
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos_kit.checks import find_wrong
from chaos_kit.faults import Fault, draw, inflict, kinds_for
from chaos_kit.job import ChaosJob

MEAN_GAP_S = 2.5


@dataclass(frozen=True)
class Done:
    """A fault that was done to a job, and undone."""

    index: int
    """In its job."""
    fault: Fault
    wrong: str
    """What the job did meanwhile that it may not."""

    def __str__(self) -> str:
        return f"fault {self.index}, {self.fault}"


@dataclass(frozen=True)
class Outcome:
    """One job and what became of it."""

    seed: str
    done: Sequence[Done]
    wrong: Sequence[str]

    def report(self) -> str:
        """For a person: seed, faults by index, what was found."""
        told = [f"seed {self.seed}: {len(self.wrong)} findings after {len(self.done)} faults", *self.wrong]
        return "\n".join([*told, *(f"  {done}" for done in self.done)])


class Storm:
    """Inflicts faults on one job until it has learnt all, or as many as are asked for.

    Args:
        job: that runs.
        random: draws the faults and the time between them.
    """

    def __init__(self, job: ChaosJob, random: Random) -> None:
        self._job = job
        self._random = random
        self._kinds = kinds_for(job.config.desktop.provider)
        self._threads: list[threading.Thread] = []
        self.done: list[Done] = []

    def rage(self, max_faults: int) -> None:
        """Inflict, then wait until the last one is undone."""
        try:
            for index in range(max_faults):
                fault, gap_s = draw(self._random, self._kinds), self._random.expovariate(1 / MEAN_GAP_S)
                if self._job.wait(gap_s):
                    break
                print(f"{index}: {fault}", file=sys.stderr, flush=True)
                thread = threading.Thread(target=self._inflict, args=(index, fault))
                self._threads.append(thread)
                thread.start()
        finally:
            for thread in self._threads:
                thread.join()

    def _inflict(self, index: int, fault: Fault) -> None:
        wrong = ""
        try:
            inflict(self._job, fault)
        except Exception as error:  # this program's own mistakes must not pass for a job in which all is well
            wrong = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        self.done.append(Done(index, fault, wrong))


def run_job(
    runs: Path, seed: str, num_updates: int, max_faults: int, model: Path, provider: str = "simulated"
) -> Outcome:
    """One job from start to judgement; its folder is kept if something is wrong."""
    random = Random(seed)
    job = ChaosJob(runs, f"chaos-{seed}", num_updates, random.getrandbits(31), model, provider)
    storm = Storm(job, random)
    wrong: list[str] = []
    try:
        job.wait_until_running()
        storm.rage(max_faults)
        job.wait_until_learnt()
    except TimeoutError as error:
        wrong.append(str(error))
    try:
        job.end()
        wrong += [f"{done}: {done.wrong}" for done in storm.done if done.wrong]
        wrong += find_wrong(job.record())
    finally:
        job.close()
    if not wrong:
        shutil.rmtree(job.folder.root)
    done = sorted(storm.done, key=lambda one: one.index)
    return Outcome(seed, done, wrong)
