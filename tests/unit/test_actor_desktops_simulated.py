"""A simulated desktop takes the configured time, shows a different screen after each action, and scores by its rule."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.desktops.simulated import Latencies, SimulatedDesktop
from deskrl.actor.materialize_tasks import load
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import Evaluation, evaluate_task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import OWN_SUITE, load_tasks
from deskrl.core.config import DesktopConfig, RunConfig, SimulatedConfig, load_config
from deskrl.core.errors import UserError

SIMULATED_RUN = load_config(Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml")


def run_on_desktop(success_rate: float, scenario: Callable[[SimulatedDesktop], Awaitable[None]]) -> None:
    """Run a scenario on a desktop whose simulated time is scaled to almost zero."""
    config = DesktopConfig(
        provider="simulated",
        width=168,
        height=112,
        simulated=SimulatedConfig(time_scale=1e-9, random_success_rate=success_rate),
    )

    async def run() -> None:
        desktop = make_desktop(config, "desktop-1", Path("/nowhere"))
        assert isinstance(desktop, SimulatedDesktop)
        await desktop.reset()
        await scenario(desktop)
        await desktop.close()

    asyncio.run(run())


async def run_episode(desktop: SimulatedDesktop, task: Task, *actions: Action, seed: int = 1) -> Evaluation:
    await desktop.reset()
    await setup_task(desktop, task, seed)
    for action in actions:
        await desktop.act(action)
    return await evaluate_task(desktop, task, None)


def test_latencies_follow_the_configured_distributions_and_depend_only_on_the_seed() -> None:
    latencies = Latencies(SimulatedConfig(), Random(7))
    resets = [latencies.reset_s() for _ in range(4001)]
    assert statistics.median(resets) == pytest.approx(45, rel=0.03)
    actions = [latencies.action_s() for _ in range(8001)]
    assert statistics.median(actions) == pytest.approx(3, rel=0.05)
    assert actions.count(60.0) / len(actions) == pytest.approx(0.005, abs=0.003)
    evaluations = [latencies.evaluation_s() for _ in range(1000)]
    assert 5 <= min(evaluations) < 6 and 24 < max(evaluations) <= 25
    repeated = Latencies(SimulatedConfig(), Random(7))
    assert [repeated.reset_s() for _ in range(3)] == resets[:3]


def test_every_task_of_the_simulated_suite_is_solved_only_by_its_scripted_solution() -> None:
    async def scenario(desktop: SimulatedDesktop) -> None:
        tasks, left_out = load(SIMULATED_RUN)
        assert len(tasks) == 4 and not left_out
        for task in tasks:
            script = [action for _, action in task.demonstrate() if not action.ends_episode]
            assert (await run_episode(desktop, task, *script)).reward == 1.0
            assert (await run_episode(desktop, task)).reward == 0.0
            assert (await run_episode(desktop, task, Action(ActionKind.TYPE, text="ambre"))).reward == 0.0

    run_on_desktop(0.0, scenario)


def test_some_episodes_succeed_at_random_by_their_seed_regardless_of_the_actions() -> None:
    async def scenario(desktop: SimulatedDesktop) -> None:
        task = load(SIMULATED_RUN)[0][0]
        rewards = [(await run_episode(desktop, task, seed=seed)).reward for seed in range(200)]
        assert 30 < sum(rewards) < 70
        assert rewards[:20] == [(await run_episode(desktop, task, seed=seed)).reward for seed in range(20)]

    run_on_desktop(0.25, scenario)


def test_every_action_and_every_episode_changes_the_screen() -> None:
    async def scenario(desktop: SimulatedDesktop) -> None:
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

    run_on_desktop(0.0, scenario)


def test_tasks_that_a_simulated_desktop_cannot_judge_are_rejected(tmp_path: Path) -> None:
    name = load_tasks()[0].id
    config = RunConfig.model_validate(
        {"runs": tmp_path, "desktop": {"provider": "simulated"}, "tasks": {"suite": OWN_SUITE}}
    )
    with pytest.raises(UserError, match=f"{name}: a simulated desktop cannot evaluate it"):
        load(config)
