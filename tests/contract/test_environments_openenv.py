"""OpenEnv environments: episodes, faults of the server, and configurations, with a double of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openenv_game import HEIGHT, WIDTH, centre_of, quarter_of
from openenv_kit import ACTIONS, MAX_SESSIONS, OpenEnvServer, openenv_server
from ports_kit import free_port

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktop_check import try_desktop
from deskrl.actor.desktops.base import Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.tasks.evaluators import evaluate_task, has_task_ended
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE, load_tasks
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

SCALE = 5
(PLAY,) = load_tasks(ENVIRONMENT_SUITE)


@pytest.fixture
def server() -> Iterator[OpenEnvServer]:
    with openenv_server() as running:
        yield running


def config_of(address: str, timeout_s: float = 30.0, **options: Any) -> RunConfig:
    given = {"address": address, "actions": ACTIONS, "min_return": -1.0, "instruction_key": "mission"} | options
    desktop = {"width": SCALE * WIDTH, "height": SCALE * HEIGHT, "step_timeout_s": timeout_s}
    return RunConfig.model_validate({"desktop": desktop | {"provider": "openenv", "provider_options": given}})


def run_on_a_desktop(config: RunConfig, use: Callable[[Desktop], Awaitable[None]]) -> None:
    async def scenario() -> None:
        desktop = make_desktop(config.desktop, "desktop", Path())
        try:
            await desktop.reset()
            await use(desktop)
        finally:
            await desktop.close()

    asyncio.run(scenario())


def click_on(quarter: int) -> Action:
    x, y = centre_of(quarter)
    return Action(ActionKind.CLICK, x=SCALE * x, y=SCALE * y)


def type_text(text: str) -> Action:
    return Action(ActionKind.TYPE, text=text)


def test_an_episode_ends_with_the_environments_reward(server: OpenEnvServer) -> None:
    async def use(desktop: Desktop) -> None:
        for quarter in range(4):
            await desktop.reset()
            assert await desktop.begin_episode(0, {"quarter": quarter}) == "Click on white."
            await desktop.act(click_on((quarter + 1) % 4))
            assert not await has_task_ended(desktop, PLAY)
            await desktop.act(click_on(quarter))
            assert await has_task_ended(desktop, PLAY)
            evaluation = await evaluate_task(desktop, PLAY, None)
            assert evaluation.reward == pytest.approx(1.75 / 2), "the return 0.75 in the range from -1 to 1"

    run_on_a_desktop(config_of(server.address), use)


def test_the_seed_of_the_group_decides_on_the_episode(server: OpenEnvServer) -> None:
    async def use(desktop: Desktop) -> None:
        for group_seed in range(20):
            for seed in range(2):
                await desktop.reset()
                await setup_task(desktop, PLAY, seed, group_seed=group_seed)
                screens.setdefault((await desktop.settle()).tobytes(), set()).add(group_seed)

    screens: dict[bytes, set[int]] = {}
    run_on_a_desktop(config_of(server.address), use)
    assert len(screens) == len({quarter_of(seed) for seed in range(20)}) == 4
    assert sum(len(groups) for groups in screens.values()) == 20


def test_values_that_the_server_rejects_and_unknown_gestures_have_no_effect(server: OpenEnvServer) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {"quarter": 3})
        for action in (type_text("much too long"), Action(ActionKind.HOTKEY, keys=("a",))):
            await desktop.act(action)
        await desktop.act(type_text("ok"))
        outcome = await desktop.episode_outcome()
        assert outcome.evidence == {"return": -0.25, "end": None, "num_steps": 1, "num_ignored_actions": 2}

    run_on_a_desktop(config_of(server.address), use)


def hang(server: OpenEnvServer) -> Action:
    server.hangs = True
    return click_on(0)


def lose_the_connection(server: OpenEnvServer) -> Action:
    server.drop_connections()
    return click_on(0)


FAULTS = {
    "did not execute the action within 0.95 s": hang,
    "the OpenEnv server at .* closed the connection": lose_the_connection,
    'with EXECUTION_ERROR: "the game is broken"': lambda server: type_text("bug"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_of_the_server_is_evidence_on_the_hosts_side(server: OpenEnvServer, reason: str) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {})
        with pytest.raises(DesktopGone, match=reason) as raised:
            await desktop.act(FAULTS[reason](server))
        assert desktop.can_observe_host and await desktop.death_cause() == str(raised.value)
        assert not await desktop.is_alive()

    run_on_a_desktop(config_of(server.address, timeout_s=1.0), use)


def test_a_desktop_without_a_free_session_does_not_start(server: OpenEnvServer) -> None:
    async def use(desktop: Desktop) -> None:
        others = [make_desktop(config.desktop, "other", Path()) for _ in range(MAX_SESSIONS)]
        for other in others[:-1]:
            await other.start()
        with pytest.raises(DesktopError, match=r"with CAPACITY_REACHED: .*Server at capacity"):
            await others[-1].start()
        for other in others:
            await other.close()

    config = config_of(server.address)
    run_on_a_desktop(config, use)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such image": ({"image_key": "screen"}, "image_key: the observation has no screen, but"),
    "no image": ({"image_key": "mission"}, "mission is not an image in base64"),
    "no instruction": ({"instruction_key": "task"}, "the observation of a reset has no text 'task'"),
    "no such field": ({"actions": {"click": {"x": 1, "y": 1, "z": 1}}}, "click: the action has no z, but label"),
    "missing field": ({"actions": {"click": {"x": "{x}"}}}, "click: y is missing"),
    "no actions": ({"actions": {}}, "actions is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_that_does_not_fit_is_one_line_before_the_run(server: OpenEnvServer, name: str) -> None:
    options, reason = WRONG[name]
    with pytest.raises(UserError, match=reason) as rejected:
        try_desktop(config_of(server.address, **options))
    assert str(rejected.value).startswith("desktop.provider_options") and "\n" not in str(rejected.value)


def test_a_server_that_does_not_answer_is_one_line_before_the_run() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"the OpenEnv server at {address} cannot be reached: .*start the server"):
        try_desktop(config_of(address))
