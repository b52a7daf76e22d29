"""Workers set desktops aside that do not start, and the actors of a run share its desktops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from deskrl.actor import metrics
from deskrl.actor import worker as worker_module
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.desktop_starts import DesktopStartError, DesktopStarts
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.lease import Lease
from deskrl.actor.main import num_desktops_of
from deskrl.actor.metrics import DesktopState
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.worker import Worker
from deskrl.core.config import ActorConfig, AgentConfig, DesktopConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.proto.v1 import rollout_pb2


class DoubleDesktop:
    """Desktop that starts, fails to start, or hangs while starting; it may die while it is idle."""

    def __init__(self, start: str) -> None:
        self._start = start
        self.closed = False

    async def reset(self) -> None:
        """Start, fail or hang."""
        if self._start == "hangs":
            await asyncio.Event().wait()
        if self._start == "fails":
            raise DesktopError("no display")

    async def is_alive(self) -> bool:
        """Return whether the desktop did not die."""
        return self._start != "dies"

    async def idle(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Record the call."""
        self.closed = True


class LeaseClientDouble:
    """Lease client that grants a number of leases, and records the requests and the leases that are released.

    Args:
        num_leases: number of leases; further requests wait forever.
    """

    def __init__(self, num_leases: int = 0) -> None:
        self._num_leases = num_leases
        self.num_requests = 0
        self.released: list[Lease] = []
        self.waiting = asyncio.Event()

    async def acquire(self) -> Lease:
        """Return a lease, or wait forever."""
        self.num_requests += 1
        if self.num_requests > self._num_leases:
            self.waiting.set()
            await asyncio.Event().wait()
        return Lease(f"lease-{self.num_requests}", rollout_pb2.Rollout(), 60.0)

    async def release(self, leases: list[Lease]) -> None:
        """Record the released leases."""
        self.released += leases


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "FIRST_RETRY_S", 0.001)


@dataclass
class Trial:
    """Outcome of a trial of workers."""

    made: list[DoubleDesktop]
    leases: LeaseClientDouble
    states: dict[str, float]
    """Number of desktops by state while the workers were running."""
    num_failures: float
    """Number of failed starts."""


def try_workers(*starts: Sequence[str], num_leases: int = 0, timeout_s: float = 60.0, lock_step: bool = False) -> Trial:
    """Run workers until one of them waits for a lease, or fails.

    Args:
        starts: for each worker, the behaviour of each of its desktops; the last one is repeated.
        num_leases: number of leases that are granted.
        timeout_s: see `DesktopStarts`.
        lock_step: see `Worker`.
    """
    made: list[DoubleDesktop] = []

    def make_desktops(behaviours: Sequence[str]) -> Callable[[], Desktop]:
        remaining = list(behaviours)

        def make_desktop() -> Desktop:
            made.append(DoubleDesktop(remaining.pop(0) if len(remaining) > 1 else remaining[0]))
            return cast(Desktop, made[-1])

        return make_desktop

    async def scenario() -> Trial:
        leases = LeaseClientDouble(num_leases)
        config = DesktopConfig(start_timeout_s=0.02)
        agent = Agent(AgentConfig())
        record = DesktopStarts(timeout_s)
        workers = [
            Worker(
                cast(Any, leases),
                cast(Any, None),
                agent,
                make_desktops(row),
                record,
                config,
                lock_step=lock_step,
                reward=make_reward(RunConfig()),
            )
            for row in starts
        ]
        failures_before = metrics.START_FAILURES._value.get()
        running = [asyncio.create_task(worker.run()) for worker in workers]
        waiting = asyncio.create_task(leases.waiting.wait())
        await asyncio.wait({*running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.05)  # the other workers go on meanwhile
        states = {state: metrics.DESKTOPS.labels(state)._value.get() for state in DesktopState}
        for task in (*running, waiting):
            task.cancel()
        await asyncio.wait({*running, waiting})
        for worker in workers:
            await worker.close()
        for task in running:
            if not task.cancelled():
                task.result()
        assert all(desktop.closed for desktop in made)
        return Trial(made, leases, states, metrics.START_FAILURES._value.get() - failures_before)

    return asyncio.run(scenario())


def test_a_desktop_that_does_not_start_is_closed_and_replaced_before_a_lease_is_requested() -> None:
    trial = try_workers(["fails", "hangs", "starts"])
    assert trial.leases.num_requests == 1 and len(trial.made) == 3 and trial.num_failures == 2


def test_a_desktop_that_does_not_start_is_set_aside_while_the_others_run() -> None:
    trial = try_workers(["fails"], ["starts"])
    assert trial.leases.num_requests == 1, "the other desktop asks for work"
    assert (trial.states["set_aside"], trial.states["idle"]) == (1, 1)
    assert trial.num_failures > 2, "the desktop is retried"


def test_a_desktop_that_was_set_aside_runs_once_it_starts() -> None:
    trial = try_workers(["fails", "fails", "fails", "starts"])
    assert trial.leases.num_requests == 1 and trial.states["set_aside"] == 0 and trial.states["idle"] == 1


def test_a_worker_ends_once_no_desktop_of_the_process_could_be_started_for_too_long() -> None:
    with pytest.raises(DesktopStartError, match=r"for 0.05 s .*start_retry_timeout_s.; last error: .*no display"):
        try_workers(["fails"], ["hangs"], timeout_s=0.05)


def test_a_process_with_one_working_desktop_does_not_give_up_the_others() -> None:
    trial = try_workers(["starts"], ["fails"], timeout_s=0.0)
    assert trial.states["set_aside"] == 1 and trial.leases.num_requests == 1


@pytest.mark.parametrize(("lock_step", "starts"), [(False, ["dies", "fails", "fails"]), (True, ["fails", "fails"])])
def test_a_lease_whose_desktop_cannot_be_renewed_is_released(lock_step: bool, starts: list[str]) -> None:
    trial = try_workers([*starts, "starts"], num_leases=1, lock_step=lock_step)
    assert [lease.id for lease in trial.leases.released] == ["lease-1"]
    assert trial.leases.num_requests == 2 and trial.num_failures == 2


@pytest.mark.parametrize(("num_envs", "shares"), [(4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3])])
def test_actors_share_all_desktops_of_the_run(num_envs: int, shares: list[int]) -> None:
    config = RunConfig(desktop=DesktopConfig(num_envs=num_envs), actor=ActorConfig(desktops_per_actor=4))
    assert [num_desktops_of(config, actor) for actor in range(len(shares))] == shares
    for actor in (-1, len(shares)):
        with pytest.raises(UserError, match=f"there is no actor {actor}"):
            num_desktops_of(config, actor)
    assert num_desktops_of(config, None) == 4, "the launcher chooses the number of actors"
