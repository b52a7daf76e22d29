"""Runs a job while injecting faults at random times, and checks its record.

Times between faults are random, so some faults strike before the job has recovered from the previous one. The same seed
draws the same faults and intervals; the state of the job at each fault depends on the machine.
"""

from __future__ import annotations

import shutil
import sys
import threading
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos_kit.checks import find_violations
from chaos_kit.faults import Fault, draw, inject, kinds_for
from chaos_kit.job import ChaosJob

MEAN_INTERVAL_S = 2.5
"""Mean time between the starts of consecutive faults."""


@dataclass(frozen=True)
class InjectedFault:
    """Fault that was injected and reverted."""

    index: int
    """Index of the fault in its job."""
    fault: Fault
    error: str
    """Misbehaviour of the job during the fault; empty if none."""

    def __str__(self) -> str:
        return f"fault {self.index}, {self.fault}"


@dataclass(frozen=True)
class Outcome:
    """Result of one job: its faults and the violations found."""

    seed: str
    faults: Sequence[InjectedFault]
    violations: Sequence[str]

    def report(self) -> str:
        """Return a readable report: seed, violations and faults."""
        title = f"seed {self.seed}: {len(self.violations)} violations after {len(self.faults)} faults"
        return "\n".join([title, *self.violations, *(f"  {fault}" for fault in self.faults)])


class FaultInjector:
    """Injects faults into one job until it finishes.

    Args:
        job: running job.
        random: random generator of the faults and of the time between them.
        only: kinds of faults to inject; empty for all.
    """

    def __init__(self, job: ChaosJob, random: Random, only: Collection[str] = ()) -> None:
        self._job = job
        self._random = random
        self._kinds = kinds_for(job.config.desktop.provider, with_vllm=job.with_vllm)
        if only:
            self._kinds = {name: self._kinds[name] for name in only}
        self._threads: list[threading.Thread] = []
        self.injected: list[InjectedFault] = []

    def run(self, max_faults: int) -> None:
        """Inject at most `max_faults` faults, and wait until the last one is reverted."""
        try:
            for index in range(max_faults):
                fault, interval_s = draw(self._random, self._kinds), self._random.expovariate(1 / MEAN_INTERVAL_S)
                if self._job.wait(interval_s):
                    break
                print(f"{index}: {fault}", file=sys.stderr, flush=True)
                thread = threading.Thread(target=self._inject, args=(index, fault))
                self._threads.append(thread)
                thread.start()
        finally:
            for thread in self._threads:
                thread.join()

    def _inject(self, index: int, fault: Fault) -> None:
        problem = ""
        try:
            inject(self._job, fault)
        except Exception as error:  # an error of the injector must not count as a passed check
            problem = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        self.injected.append(InjectedFault(index, fault, problem))


def run_job(
    runs: Path,
    seed: str,
    num_updates: int,
    max_faults: int,
    model: Path,
    provider: str = "simulated",
    *,
    with_vllm: bool = False,
    only: Collection[str] = (),
) -> Outcome:
    """Run one job under faults and check its record; its run directory is kept if a check fails.

    Args:
        runs: directory of runs.
        seed: seed of the job and of its faults.
        num_updates: number of updates after which the job finishes.
        max_faults: maximum number of faults.
        model: model folder made by `build_model`.
        provider: desktop provider, `simulated` or `embedded`.
        with_vllm: use vLLM instead of the light engine.
        only: kinds of faults to inject; empty for all.
    """
    random = Random(seed)
    job = ChaosJob(runs, f"chaos-{seed}", num_updates, random.getrandbits(31), model, provider, with_vllm=with_vllm)
    injector = FaultInjector(job, random, only)
    violations: list[str] = []
    try:
        job.wait_until_running()
        injector.run(max_faults)
        job.wait_until_finished()
    except TimeoutError as error:
        violations.append(str(error))
    try:
        job.stop()
        violations += [f"{fault}: {fault.error}" for fault in injector.injected if fault.error]
        violations += find_violations(job.record())
    finally:
        job.close()
    if not violations:
        shutil.rmtree(job.folder.root)
    return Outcome(seed, sorted(injector.injected, key=lambda fault: fault.index), violations)
