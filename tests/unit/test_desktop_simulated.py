"""A simulated desktop takes the time that it is told to, shows another screen each time, and judges by its rule."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import DesktopGone
from deskrl.actor.desktops.provider import make_desktop
from deskrl.actor.desktops.simulated import Latencies, SimulatedDesktop
from deskrl.actor.prepare import load
from deskrl.actor.tasks.evaluators import Evaluation, evaluate_task
from deskrl.actor.tasks.files import OWN_SUITE, Task, load_tasks
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.core.config import DesktopConfig, RunConfig, SimulatedConfig, load_config
from deskrl.core.errors import UserError

SIMULATED_RUN = load_config(Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml")


def on_desktop(luck: float, play: Callable[[SimulatedDesktop], Awaitable[None]]) -> None:
    """Do something with a desktop on which time passes at once."""
    config = DesktopConfig(
        provider="simulated", width=168, height=112, simulated=SimulatedConfig(time_scale=1e-9, luck=luck)
    )

    async def run() -> None:
        desktop = make_desktop(config, "desktop-1", Path("/nowhere"))
        assert isinstance(desktop, SimulatedDesktop)
        await desktop.reset()
        await play(desktop)
        await desktop.close()

    asyncio.run(run())


async def judge(desktop: SimulatedDesktop, task: Task, *actions: Action, seed: int = 1) -> Evaluation:
    await desktop.reset()
    await setup_task(desktop, task, seed)
    for action in actions:
        await desktop.act(action)
    return await evaluate_task(desktop, task, None)


def test_times_follow_the_configured_distributions_and_the_seed_alone() -> None:
    drawn = Latencies(SimulatedConfig(), Random(7))
    resets = [drawn.reset_s() for _ in range(4001)]
    assert statistics.median(resets) == pytest.approx(45, rel=0.03)
    actions = [drawn.action_s() for _ in range(8001)]
    assert statistics.median(actions) == pytest.approx(3, rel=0.05)
    assert actions.count(60.0) / len(actions) == pytest.approx(0.005, abs=0.003)
    evaluations = [drawn.evaluation_s() for _ in range(1000)]
    assert 5 <= min(evaluations) < 6 and 24 < max(evaluations) <= 25
    again = Latencies(SimulatedConfig(), Random(7))
    assert [again.reset_s() for _ in range(3)] == resets[:3]


def test_every_task_of_its_suite_is_solved_by_its_script_and_not_without_it() -> None:
    async def play(desktop: SimulatedDesktop) -> None:
        tasks, left_out = load(SIMULATED_RUN)
        assert len(tasks) == 4 and not left_out
        for task in tasks:
            script = [action for _, action in task.demonstrate() if not action.ends_episode]
            assert (await judge(desktop, task, *script)).reward == 1.0
            assert (await judge(desktop, task)).reward == 0.0
            assert (await judge(desktop, task, Action(ActionKind.TYPE, text="ambre"))).reward == 0.0

    on_desktop(0.0, play)


def test_luck_rewards_some_episodes_by_their_seed_whatever_was_done() -> None:
    async def play(desktop: SimulatedDesktop) -> None:
        task = load(SIMULATED_RUN)[0][0]
        rewards = [(await judge(desktop, task, seed=seed)).reward for seed in range(200)]
        assert 30 < sum(rewards) < 70
        assert rewards[:20] == [(await judge(desktop, task, seed=seed)).reward for seed in range(20)]

    on_desktop(0.25, play)


def test_no_two_moments_look_the_same() -> None:
    async def play(desktop: SimulatedDesktop) -> None:
        task = load(SIMULATED_RUN)[0][0]
        screens = []
        for seed in range(3):
            await setup_task(desktop, task, seed)
            for _ in range(3):
                screens.append(await desktop.screenshot())
                assert (await desktop.screenshot()).tobytes() == screens[-1].tobytes()
                await desktop.act(Action(ActionKind.CLICK, x=1, y=1))
        assert {screen.size for screen in screens} == {(168, 112)}
        assert len({screen.tobytes() for screen in screens}) == len(screens)

    on_desktop(0.0, play)


def test_a_closed_one_is_gone() -> None:
    async def play(desktop: SimulatedDesktop) -> None:
        await desktop.close()
        assert not await desktop.is_alive()
        with pytest.raises(DesktopGone):
            await desktop.act(Action(ActionKind.WAIT))

    on_desktop(0.0, play)


def test_tasks_that_it_cannot_judge_are_refused(tmp_path: Path) -> None:
    name = load_tasks()[0].id
    config = RunConfig.model_validate(
        {"runs": tmp_path, "desktop": {"provider": "simulated"}, "tasks": {"suite": OWN_SUITE}}
    )
    with pytest.raises(UserError, match=f"{name}: a simulated desktop cannot judge it"):
        load(config)
