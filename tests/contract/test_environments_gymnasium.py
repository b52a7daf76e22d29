"""Gymnasium environments in processes of their own: episodes, faults of the environment, and configurations."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from target_game import HEIGHT, KEY_OF_QUARTER, KEYS, TARGET_ID, WIDTH, picture, quarter_of

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktop_check import try_desktop
from deskrl.actor.desktops.base import Desktop, DesktopGone
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.tasks.evaluators import evaluate_task, has_task_ended
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE, load_tasks
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

KIT = Path(__file__).parents[1] / "kit"
SCALE = 5
(PLAY,) = load_tasks(ENVIRONMENT_SUITE)


@pytest.fixture(autouse=True)
def importable_kit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(KIT))


def config_of(timeout_s: float = 30.0, memory_bytes: int = 2 * 1024**3, **options: Any) -> RunConfig:
    given = {"id": TARGET_ID, "actions": KEYS, "min_return": -1.0} | options
    desktop = {"width": SCALE * WIDTH, "height": SCALE * HEIGHT, "step_timeout_s": timeout_s}
    values = desktop | {"provider": "gymnasium", "provider_options": given, "memory_bytes": memory_bytes}
    return RunConfig.model_validate({"desktop": values})


def run_on_a_desktop(config: RunConfig, root: Path, use: Callable[[Desktop], Awaitable[None]]) -> None:
    async def scenario() -> None:
        desktop = make_desktop(config.desktop, "desktop", root)
        try:
            await desktop.reset()
            await use(desktop)
        finally:
            await desktop.close()

    asyncio.run(scenario())


def press(key: str, repeat: int = 1) -> Action:
    return Action(ActionKind.HOTKEY, keys=(key,), repeat=repeat)


def environment_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "gymnasium_process" in " ".join(child.cmdline())]


def test_an_episode_ends_with_the_environments_reward(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        for _ in range(2):
            await desktop.begin_episode(7, {})
            key = KEY_OF_QUARTER[quarter_of(7)]
            wrong = KEY_OF_QUARTER[quarter_of(7) - 1]
            await desktop.act(press(wrong))
            assert not await has_task_ended(desktop, PLAY)
            await desktop.act(press(key, repeat=3))
            assert await has_task_ended(desktop, PLAY)
            evaluation = await evaluate_task(desktop, PLAY, None)
            assert evaluation.reward == pytest.approx(1.75 / 2), "the return 0.75 in the range from -1 to 1"
            shown = evaluation.evidence["checks"][0]["result"]
            assert (shown["return"], shown["end"], shown["num_steps"]) == (0.75, "terminated", 2)

    run_on_a_desktop(config_of(), tmp_path, use)


def test_an_episode_that_the_environment_has_not_ended_gets_nothing_unless_that_is_its_aim(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(7, {})
        rewards.append((await evaluate_task(desktop, PLAY, Action(ActionKind.FINISHED))).reward)

    rewards: list[float] = []
    run_on_a_desktop(config_of(), tmp_path, use)
    run_on_a_desktop(config_of(requires_end=False), tmp_path, use)
    assert rewards == [0.0, 0.5]


def test_a_time_limit_of_the_environment_ends_the_episode(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {"quarter": 0})
        await desktop.act(press("right", repeat=5))
        outcome = await desktop.episode_outcome()
        assert (outcome.evidence["end"], outcome.evidence["num_steps"], outcome.reward) == ("truncated", 2, 0.25)

    run_on_a_desktop(config_of(id="target_game:TimedTarget-v0"), tmp_path, use)


def test_the_screen_shows_the_image_and_actions_without_meaning_leave_it_alone(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(7, {})
        screen = await desktop.settle()
        (left, top, right, bottom) = screen.getbbox() or (0, 0, 0, 0)
        rows, columns = picture(quarter_of(7))[:, :, 0].any(axis=1), picture(quarter_of(7))[:, :, 0].any(axis=0)
        assert (top, bottom) == (SCALE * rows.argmax(), SCALE * (HEIGHT - rows[::-1].argmax()))
        assert (left, right) == (SCALE * columns.argmax(), SCALE * (WIDTH - columns[::-1].argmax()))
        await desktop.act(press("f5"))
        await desktop.act(Action(ActionKind.CLICK, x=3, y=3))
        assert (await desktop.settle()).tobytes() == screen.tobytes()
        outcome = await desktop.episode_outcome()
        assert outcome.evidence == {"return": 0.0, "end": None, "num_steps": 0, "num_ignored_actions": 2}

    run_on_a_desktop(config_of(), tmp_path, use)


@pytest.mark.parametrize("space", ["point", "cell"])
def test_a_click_hits_the_place_that_the_image_shows(tmp_path: Path, space: str) -> None:
    async def use(desktop: Desktop) -> None:
        for quarter in range(4):
            await desktop.begin_episode(0, {"quarter": quarter})
            left, top, right, bottom = (await desktop.screenshot()).getbbox() or (0, 0, 0, 0)
            await desktop.act(Action(ActionKind.CLICK, x=(left + right) // 2, y=(top + bottom) // 2))
            assert (await desktop.episode_outcome()).evidence["return"] == 1.0

    actions = {} if space == "point" else {"click": ["{x}", "{y}"]}
    run_on_a_desktop(config_of(kwargs={"space": space}, actions=actions), tmp_path, use)


def test_members_of_a_group_get_the_same_seed_and_each_group_another_one(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        for group_seed in range(20):
            screens = []
            for seed in range(2):
                await desktop.reset()
                instruction = await setup_task(desktop, PLAY, seed, group_seed=group_seed)
                screens.append((await desktop.settle()).tobytes())
            assert screens[0] == screens[1] and instruction == "Play.\nHit the white square."
            seen.add(screens[0])

    seen: set[bytes] = set()
    options = {"image": "image", "instruction": "Play.", "instruction_key": "mission", "kwargs": {"observes": True}}
    run_on_a_desktop(config_of(**options), tmp_path, use)
    assert len(seen) == 4


FAULTS = {
    "raise": "the environment raised ZeroDivisionError: the game is broken",
    "exit": "the environment's process ended with the exit status 3",
    "kill": "the environment's process was ended by SIGKILL",
    "hang": "the environment did not execute the action within 0.95 s",
    "leak": "the environment raised .*MemoryError",
    "nan": "the environment raised ValueError: the environment returned the reward nan",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_environment_is_evidence_on_the_hosts_side(tmp_path: Path, fault: str) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {})
        with pytest.raises(DesktopGone, match=FAULTS[fault]) as raised:
            await desktop.act(press("left"))
        assert desktop.can_observe_host and await desktop.death_cause() == str(raised.value)
        assert not await desktop.is_alive()
        with pytest.raises(DesktopGone, match=FAULTS[fault]):
            await desktop.screenshot()

    kwargs = {"fault": fault, "fault_file": str(tmp_path / "fault")}
    run_on_a_desktop(config_of(timeout_s=1.0, memory_bytes=512 * 1024**2, kwargs=kwargs), tmp_path, use)
    assert environment_processes() == []


def test_an_environment_that_is_killed_between_two_calls_is_detected(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {})
        (process,) = environment_processes()
        process.kill()  # the event loop waits for its end
        while await desktop.is_alive():
            await asyncio.to_thread(os.sched_yield)
        assert await desktop.death_cause() == "the environment's process was ended by SIGKILL"

    run_on_a_desktop(config_of(), tmp_path, use)


def test_a_call_that_the_caller_cancels_is_evidence_too(tmp_path: Path) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.begin_episode(0, {})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desktop.act(press("left")), 0.1)
        assert await desktop.death_cause() == "the environment did not execute the action in time"

    run_on_a_desktop(config_of(kwargs={"fault": "hang", "fault_file": str(tmp_path / "fault")}), tmp_path, use)


def test_a_hanging_environment_ends_with_its_actor(tmp_path: Path) -> None:
    script = tmp_path / "actor.py"
    script.write_text(
        "import asyncio, pathlib\n"
        "from deskrl.actor.actions import Action, ActionKind\n"
        "from deskrl.actor.desktops.provider_registry import make_desktop\n"
        "from deskrl.core.config import DesktopConfig\n"
        f"config = DesktopConfig.model_validate({config_of().desktop.model_dump(mode='json')!r})\n"
        f"options = config.provider_options\n"
        f"options['kwargs'] = {{'fault': 'hang', 'fault_file': {str(tmp_path / 'fault')!r}}}\n"
        "async def main():\n"
        "    desktop = make_desktop(config, 'd', pathlib.Path('.'))\n"
        "    await desktop.start()\n"
        "    print('started', flush=True)\n"
        "    await desktop.act(Action(ActionKind.HOTKEY, keys=('left',)))\n"
        "asyncio.run(main())\n"
    )
    actor = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert actor.stdout is not None
    assert actor.stdout.readline() == "started\n"
    (environment,) = psutil.Process(actor.pid).children()
    while not (tmp_path / "fault").exists():
        assert actor.poll() is None
    os.kill(actor.pid, signal.SIGKILL)
    actor.wait()
    environment.wait(30)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such id": ({"id": "Tarket-v0"}, "Tarket-v0 cannot be made: NameNotFound"),
    "no such module": ({"id": "no_such_module:Target-v0"}, "cannot be made: ModuleNotFoundError"),
    "no such argument": ({"kwargs": {"size": 3}}, "cannot be made: TypeError"),
    "no images": ({"id": "target_game:Blind-v0"}, "renders no images: it has no render mode rgb_array"),
    "no such key": ({"image": "screen"}, "the observation Box.* has no key 'screen'"),
    "no image": ({"image": "mission", "kwargs": {"observes": True}}, "mission: not an image"),
    "no mapping": ({"actions": {}}, r"the action space Discrete\(4\) needs a table of actions"),
    "no such action": ({"actions": {"press a": 4}}, "press a: 4 is not in the action space"),
    "no instruction": ({"instruction_key": "mission"}, "neither observation nor info of a reset has a text 'mission'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_that_does_not_fit_is_one_line_before_the_run(name: str) -> None:
    options, reason = WRONG[name]
    with pytest.raises(UserError, match=reason) as rejected:
        try_desktop(config_of(**options))
    assert str(rejected.value).startswith("desktop.provider_options: ")
    assert "\n" not in str(rejected.value)
    assert environment_processes() == []
