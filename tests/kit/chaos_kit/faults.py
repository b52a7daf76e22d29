"""Faults: what is drawn from a seed, and how each is done to a running job and undone.

Knows the job's roles, links and disk; knows no rule of what has to be true afterwards.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from random import Random

import psutil

from chaos_kit.disk import SlowCalls
from chaos_kit.job import ACTORS, LINKS, ROLES, ChaosJob
from chaos_kit.roles import RoleProcess
from deskrl.core.running.supervisor import USER_ERROR_STATUS

_JUMP_S = 12 * 3600.0


@dataclass(frozen=True)
class Fault:
    """One fault, as it was drawn."""

    kind: str
    target: str
    """A role, a link, or a file of the store."""
    length_s: float
    amount: float
    """Seconds of a delay or a jump; share of a file that is left; which of several processes, from 0 to 1."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.target} ({self.length_s:.2f} s, {self.amount:.3f})"


@dataclass(frozen=True)
class _Kind:
    """How faults of a kind are drawn and done."""

    inflict: Callable[[ChaosJob, Fault], None]
    """Does it, lasts as long as it does, undoes it. Raises AssertionError for what the job may not do meanwhile."""
    targets: tuple[str, ...]
    weight: float
    lengths_s: tuple[float, float] = (0.0, 0.0)
    amounts: tuple[float, float] = (0.0, 0.0)
    program: str = ""
    """That it takes."""


def _kill(job: ChaosJob, fault: Fault) -> None:
    job.check_gone(fault.target, job.roles[fault.target].kill())


def _stop(job: ChaosJob, fault: Fault) -> None:
    role = job.roles[fault.target]
    pid = role.pause()
    job.wait(fault.length_s)
    role.go_on(pid)


def _delay(job: ChaosJob, fault: Fault) -> None:
    job.links[fault.target].delay(fault.amount)
    job.wait(fault.length_s)
    job.links[fault.target].delay(0.0)


def _partition(job: ChaosJob, fault: Fault) -> None:
    _for_a_while(job, fault, job.links[fault.target].hold)


def _reset(job: ChaosJob, fault: Fault) -> None:
    _for_a_while(job, fault, job.links[fault.target].cut)


def _corrupt(job: ChaosJob, fault: Fault) -> None:
    _for_a_while(job, fault, job.links[fault.target].corrupt)


def _for_a_while(job: ChaosJob, fault: Fault, switch: Callable[[bool], None]) -> None:
    switch(True)
    job.wait(fault.length_s)
    switch(False)


def _fill_disk(job: ChaosJob, fault: Fault) -> None:
    deadline_s = time.monotonic() + fault.length_s
    with job.disk.lock:
        while time.monotonic() < deadline_s and not job.wait(0.1):
            job.disk.fill()  # again and again: what the store gives back is taken too
        job.disk.free()


def _slow_disk(job: ChaosJob, fault: Fault) -> None:
    with closing(SlowCalls(job.roles["replay"].pid, fault.amount)):
        job.wait(fault.length_s)


def _kill_on_desktop(job: ChaosJob, fault: Fault) -> None:
    """kill -9 of any process of a desktop: the display, the guest's server, an application, all of it."""
    processes = [one for desktop in _desktops(job, fault.target) for one in desktop]
    if processes:
        _signal([processes[int(fault.amount * len(processes))]], signal.SIGKILL)


def _hang_desktop(job: ChaosJob, fault: Fault) -> None:
    """A whole desktop stops; what is left of it later goes on."""
    desktops = _desktops(job, fault.target)
    chosen = desktops[int(fault.amount * len(desktops))] if desktops else []
    _signal(chosen, signal.SIGSTOP)
    job.wait(fault.length_s)
    _signal(chosen, signal.SIGCONT)


def _desktops(job: ChaosJob, actor: str) -> list[list[psutil.Process]]:
    """The processes of each of an actor's desktops."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(job.roles[actor].pid).children()
        return [[child, *child.children(recursive=True)] for child in children]
    return []


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _jump(job: ChaosJob, fault: Fault) -> None:
    """The wall clock jumps, and jumps back."""
    job.clocks[fault.target].shift(round(fault.amount))
    job.wait(fault.length_s)
    job.clocks[fault.target].shift(0)


def _cut_short(job: ChaosJob, fault: Fault) -> None:
    """kill -9, and a file cut short: replay refuses its store, and the file is restored, or it has lost nothing."""
    role, store = job.roles["replay"], job.disk.path
    with job.disk.lock, role.lock:
        role.kill()
        path = max((store / "screenshots").iterdir()) if fault.target == "screenshots" else store / fault.target
        copy = job.folder.root / "copy"
        shutil.copy(path, copy)
        with open(path, "r+b") as file:
            file.truncate(int(fault.amount * copy.stat().st_size))
        if _refuses(role, path.name):
            shutil.copy(copy, path)


def _refuses(role: RoleProcess, name: str) -> bool:
    """Whether replay refuses its store rather than serve it; it ends in no other way."""
    with subprocess.Popen(list(role.command), stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        told = next((line for line in started.stderr if "serving" in line or line.startswith("deskrl: ")), "")
        started.kill()
        status = started.wait()
    if "serving" in told:
        return False
    assert status in (USER_ERROR_STATUS, -signal.SIGKILL) and name in told, f"on a cut {name} replay said: {told}"
    return True


KINDS: dict[str, _Kind] = {
    "kill": _Kind(_kill, ("replay", "inference", *ACTORS), 4),
    "kill_learner": _Kind(_kill, ("learner",), 0.7),
    "stop": _Kind(_stop, ROLES, 4, (0.3, 6.0)),
    "delay": _Kind(_delay, LINKS, 3, (0.5, 5.0), (0.02, 0.8)),
    "partition": _Kind(_partition, LINKS, 3, (0.3, 6.0)),
    "reset": _Kind(_reset, LINKS, 3, (0.0, 3.0)),
    "corrupt": _Kind(_corrupt, LINKS, 2, (0.2, 2.0)),
    "full_disk": _Kind(_fill_disk, ("replay",), 1.5, (0.5, 4.0)),
    "slow_disk": _Kind(_slow_disk, ("replay",), 1.5, (1.0, 5.0), (0.02, 0.2), program="strace"),
    "clock_jump": _Kind(_jump, ROLES, 2, (0.5, 5.0), (-_JUMP_S, _JUMP_S)),
    "cut_short": _Kind(_cut_short, ("replay.sqlite", "screenshots"), 1, amounts=(0.0, 0.95)),
}


DESKTOP_KINDS: dict[str, _Kind] = {
    "kill_on_desktop": _Kind(_kill_on_desktop, ACTORS, 6, amounts=(0.0, 1.0)),
    "hang_desktop": _Kind(_hang_desktop, ACTORS, 6, (0.5, 9.0), (0.0, 1.0)),
}
"""Of desktops that have processes of their own."""


def left_out() -> dict[str, str]:
    """Kinds that cannot be done on this machine, by the program that is absent."""
    return {name: kind.program for name, kind in KINDS.items() if kind.program and not shutil.which(kind.program)}


def kinds_for(provider: str) -> dict[str, _Kind]:
    """What can be done on this machine to a job with desktops of a provider."""
    kinds = {**KINDS, **(DESKTOP_KINDS if provider == "embedded" else {})}
    return {name: kind for name, kind in kinds.items() if name not in left_out()}


def draw(random: Random, kinds: Mapping[str, _Kind]) -> Fault:
    """The next fault."""
    (name,) = random.choices(list(kinds), [kind.weight for kind in kinds.values()])
    kind = kinds[name]
    return Fault(name, random.choice(kind.targets), random.uniform(*kind.lengths_s), random.uniform(*kind.amounts))


def inflict(job: ChaosJob, fault: Fault) -> None:
    """Do it, and undo it."""
    (KINDS | DESKTOP_KINDS)[fault.kind].inflict(job, fault)
