"""How a worker comes by a desktop, and how desktops are shared out. Desktops that do not start are doubles."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from deskrl.actor.agent.conversation import UiTarsAgent
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.main import desktops_of
from deskrl.actor.worker import MAX_FAILED_STARTS, DesktopsDoNotStart, Worker
from deskrl.core.config import ActorConfig, AgentConfig, DesktopConfig, RunConfig
from deskrl.core.errors import UserError


class DoubleDesktop:
    """A desktop that comes up, fails to, or hangs while it does."""

    def __init__(self, start: str) -> None:
        self._start = start
        self.closed = False

    async def reset(self) -> None:
        """Come up, or not."""
        if self._start == "hangs":
            await asyncio.Event().wait()
        if self._start == "fails":
            raise DesktopError("no display")

    async def idle(self) -> None:
        """Stay awake."""

    async def close(self) -> None:
        """Note it."""
        self.closed = True


class NoWork:
    """A replay service that has no work, and says that it was asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def acquire(self) -> Any:
        """Have none."""
        self.asked.set()
        await asyncio.Event().wait()


def start_worker(starts: list[str]) -> tuple[list[DoubleDesktop], bool]:
    """Let a worker try desktops that behave so when started; those made, and whether it came to ask for work."""
    made: list[DoubleDesktop] = []

    def make_desktop() -> Desktop:
        made.append(DoubleDesktop(starts[len(made)]))
        return cast(Desktop, made[-1])

    async def scenario() -> bool:
        replay = NoWork()
        config = DesktopConfig(start_timeout_s=0.02)
        agent = UiTarsAgent(AgentConfig())
        worker = Worker(cast(Any, replay), cast(Any, None), agent, make_desktop, config)
        running = asyncio.create_task(worker.run())
        asked = asyncio.create_task(replay.asked.wait())
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        closed_before_the_end = [desktop.closed for desktop in made]
        running.cancel()
        asked.cancel()
        await asyncio.wait({running, asked})
        await worker.close()
        if not running.cancelled():
            running.result()
        assert closed_before_the_end == [True] * (len(made) - 1) + [False]
        assert all(desktop.closed for desktop in made)
        return replay.asked.is_set()

    return made, asyncio.run(scenario())


def test_a_desktop_that_does_not_come_up_is_closed_and_another_tried_before_work_is_asked_for() -> None:
    made, asked = start_worker(["fails", "hangs", "comes up"])
    assert asked and len(made) == 3


def test_a_machine_on_which_no_desktop_starts_is_given_up() -> None:
    with pytest.raises(DesktopsDoNotStart, match="5 desktops in a row did not start"):
        start_worker(["fails"] * MAX_FAILED_STARTS)


@pytest.mark.parametrize(("num_envs", "shares"), [(4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3])])
def test_actors_share_all_desktops_of_the_run(num_envs: int, shares: list[int]) -> None:
    config = RunConfig(desktop=DesktopConfig(num_envs=num_envs), actor=ActorConfig(desktops_per_actor=4))
    assert [desktops_of(config, actor) for actor in range(len(shares))] == shares
    for actor in (-1, len(shares)):
        with pytest.raises(UserError, match=f"there is no actor {actor}"):
            desktops_of(config, actor)
    assert desktops_of(config, None) == 4, "one that a launcher counts"
