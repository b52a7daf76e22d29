"""Kinds of faults: how each is drawn from a seed, injected into a running job and reverted."""

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
from hostile_guest_kit import BODY_FORMS, INVALID_FORMS, Form, hostile_guest

from chaos_kit.disk import SlowCalls
from chaos_kit.job import ACTORS, LINKS, ROLES, ChaosJob
from chaos_kit.role_process import RoleProcess
from deskrl.actor.desktops.embedded import EmbeddedProvider
from deskrl.actor.main import desktops_dir
from deskrl.launch.supervisor import USER_ERROR_STATUS

ENDLESS = {name: INVALID_FORMS[name] for name in ("silence", "dripping header", "dripping body")}
"""Forms of a guest server that does not return; they use no memory and little processor time."""
NONSENSE = {
    name: form for name, form in (INVALID_FORMS | BODY_FORMS).items() if name not in ENDLESS and "end" not in name
}
"""Forms of a guest server that answers nonsense at once."""
_JUMP_S = 12 * 3600.0


@dataclass(frozen=True)
class Fault:
    """One drawn fault."""

    kind: str
    target: str
    """Role, link or file of the replay store."""
    duration_s: float
    amount: float
    """Seconds of a delay or clock jump, share of a file that is kept, or choice of a process, from 0 to 1."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.target} ({self.duration_s:.2f} s, {self.amount:.3f})"


@dataclass(frozen=True)
class _Kind:
    """Distribution and implementation of a kind of fault."""

    inject: Callable[[ChaosJob, Fault], None]
    """Injects the fault, waits for its duration and reverts it; raises AssertionError if the job misbehaves."""
    targets: tuple[str, ...]
    weight: float
    durations_s: tuple[float, float] = (0.0, 0.0)
    amounts: tuple[float, float] = (0.0, 0.0)
    program: str = ""
    """External program that the fault requires."""


def _kill(job: ChaosJob, fault: Fault) -> None:
    job.check_descendants_exit(fault.target, job.roles[fault.target].kill())


def _kill_engine(job: ChaosJob, fault: Fault) -> None:
    """Kill the engine process of a replica (SIGKILL), whose server must notice it and exit."""
    role = job.roles[fault.target]
    with role.lock, suppress(psutil.NoSuchProcess):
        engines = [child for child in psutil.Process(role.pid).children(recursive=True) if _is_engine(child)]
        if engines:
            role.expect_exit()
            _signal(engines, signal.SIGKILL)


def _is_engine(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "EngineCore" in " ".join([process.name(), *process.cmdline()])
    return False


def _stop(job: ChaosJob, fault: Fault) -> None:
    role = job.roles[fault.target]
    pid = role.pause()
    job.wait(fault.duration_s)
    role.resume(pid)


def _delay(job: ChaosJob, fault: Fault) -> None:
    job.links[fault.target].set_delay(fault.amount)
    job.wait(fault.duration_s)
    job.links[fault.target].set_delay(0.0)


def _partition(job: ChaosJob, fault: Fault) -> None:
    _enable_for_duration(job, fault, job.links[fault.target].set_partitioned)


def _reset(job: ChaosJob, fault: Fault) -> None:
    _enable_for_duration(job, fault, job.links[fault.target].set_resetting)


def _corrupt(job: ChaosJob, fault: Fault) -> None:
    _enable_for_duration(job, fault, job.links[fault.target].set_corrupting)


def _enable_for_duration(job: ChaosJob, fault: Fault, enable: Callable[[bool], None]) -> None:
    enable(True)
    job.wait(fault.duration_s)
    enable(False)


def _fill_disk(job: ChaosJob, fault: Fault) -> None:
    deadline_s = time.monotonic() + fault.duration_s
    with job.disk.lock:
        while time.monotonic() < deadline_s and not job.wait(0.1):
            job.disk.fill()  # repeatedly, to take the space that the store frees
        job.disk.free()


def _slow_disk(job: ChaosJob, fault: Fault) -> None:
    with closing(SlowCalls(job.roles["replay"].pid, fault.amount)):
        job.wait(fault.duration_s)


def _kill_on_desktop(job: ChaosJob, fault: Fault) -> None:
    """Kill any process of a desktop (SIGKILL): the display, the guest server or an application."""
    processes = [process for desktop in _desktops(job, fault.target) for process in desktop]
    if processes:
        _signal([processes[int(fault.amount * len(processes))]], signal.SIGKILL)


def _hang_desktop(job: ChaosJob, fault: Fault) -> None:
    """Stop all processes of a desktop (SIGSTOP), and continue those that still exist."""
    desktops = _desktops(job, fault.target)
    chosen = desktops[int(fault.amount * len(desktops))] if desktops else []
    _signal(chosen, signal.SIGSTOP)
    job.wait(fault.duration_s)
    _signal(chosen, signal.SIGCONT)


def _desktops(job: ChaosJob, actor: str) -> list[list[psutil.Process]]:
    """Return the processes of each desktop of an actor."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(job.roles[actor].pid).children()
        return [[child, *child.children(recursive=True)] for child in children]
    return []


def _answer_nonsense(job: ChaosJob, fault: Fault) -> None:
    """Let another program answer in place of a guest server, in a form that is invalid for every operation."""
    _replace_guest(job, fault, list(NONSENSE.values()))


def _never_return(job: ChaosJob, fault: Fault) -> None:
    """Let a guest server accept requests and not answer them, or not to the end."""
    _replace_guest(job, fault, list(ENDLESS.values()))


def _replace_guest(job: ChaosJob, fault: Fault, forms: Sequence[Form]) -> None:
    """Serve hostile responses at the socket of a desktop, and put its own socket back."""
    sockets = sorted(desktops_dir(job.config).glob(f"*/{EmbeddedProvider.socket_name}"))
    if not sockets:
        return
    path = sockets[int(fault.amount * len(sockets))]
    aside = path.with_name("replaced")
    with suppress(FileNotFoundError):  # a desktop that ends meanwhile takes its folder and both sockets with it
        path.rename(aside)
        with hostile_guest(path) as guest:
            guest.form = forms[int(fault.amount * 1000) % len(forms)]
            job.wait(fault.duration_s)
        if aside.exists():
            aside.rename(path)


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _jump(job: ChaosJob, fault: Fault) -> None:
    """Make the wall clock of a role jump, and jump back."""
    job.clocks[fault.target].shift(round(fault.amount))
    job.wait(fault.duration_s)
    job.clocks[fault.target].shift(0)


def _truncate(job: ChaosJob, fault: Fault) -> None:
    """Kill replay and truncate a file of its store; restore the file if replay rejects the store.

    If replay accepts the store, the truncated data must not have been acknowledged, which the checks verify.
    """
    role, store = job.roles["replay"], job.disk.path
    with job.disk.lock, role.lock:
        role.kill()
        path = max((store / "screenshots").iterdir()) if fault.target == "screenshots" else store / fault.target
        copy = job.folder.root / "copy"
        shutil.copy(path, copy)
        with open(path, "r+b") as file:
            file.truncate(int(fault.amount * copy.stat().st_size))
        if _rejects_store(role, path.name):
            shutil.copy(copy, path)


def _rejects_store(role: RoleProcess, name: str) -> bool:
    """Return whether replay rejects its store; assert that it otherwise serves it."""
    with subprocess.Popen(list(role.command), stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        line = next((line for line in started.stderr if "serving" in line or line.startswith("deskrl: ")), "")
        started.kill()
        status = started.wait()
    if "serving" in line:
        return False
    assert status in (USER_ERROR_STATUS, -signal.SIGKILL) and name in line, (
        f"with {name} truncated, replay wrote: {line}"
    )
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
    "cut_short": _Kind(_truncate, ("replay.sqlite", "screenshots"), 1, amounts=(0.0, 0.95)),
}


DESKTOP_KINDS: dict[str, _Kind] = {
    "kill_on_desktop": _Kind(_kill_on_desktop, ACTORS, 6, amounts=(0.0, 1.0)),
    "hang_desktop": _Kind(_hang_desktop, ACTORS, 6, (0.5, 9.0), (0.0, 1.0)),
    "answer_nonsense": _Kind(_answer_nonsense, ("guest",), 4, (0.5, 4.0), (0.0, 1.0)),
    "never_return": _Kind(_never_return, ("guest",), 4, (6.0, 9.0), (0.0, 1.0)),
}
"""Faults of desktops that consist of processes on this machine."""


ENGINE_KINDS: dict[str, _Kind] = {"kill_engine": _Kind(_kill_engine, ("inference",), 4)}
"""Faults of replicas whose engine is a process of its own, as vLLM's is."""
_ALL_KINDS = KINDS | DESKTOP_KINDS | ENGINE_KINDS


def unavailable_kinds() -> dict[str, str]:
    """Return the kinds that cannot be injected on this machine, with the missing program."""
    return {name: kind.program for name, kind in KINDS.items() if kind.program and not shutil.which(kind.program)}


def kinds_for(provider: str, *, with_vllm: bool = False) -> dict[str, _Kind]:
    """Return the kinds that can be injected on this machine into a job with desktops of a provider."""
    kinds = KINDS | (DESKTOP_KINDS if provider == "embedded" else {}) | (ENGINE_KINDS if with_vllm else {})
    return {name: kind for name, kind in kinds.items() if name not in unavailable_kinds()}


def draw(random: Random, kinds: Mapping[str, _Kind]) -> Fault:
    """Draw the next fault."""
    (name,) = random.choices(list(kinds), [kind.weight for kind in kinds.values()])
    kind = kinds[name]
    return Fault(name, random.choice(kind.targets), random.uniform(*kind.durations_s), random.uniform(*kind.amounts))


def inject(job: ChaosJob, fault: Fault) -> None:
    """Inject a fault, wait for its duration and revert it."""
    _ALL_KINDS[fault.kind].inject(job, fault)
