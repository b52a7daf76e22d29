"""Specification of MiniWoB++'s own pages: all start with an instruction, drags and canvases work, no cheat is rewarded.

The package is not a dependency: MINIWOB_WHEEL is the path of its wheel (`pip download --no-deps miniwob==1.1.0`).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.browser_programs import find_browser
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.miniwob.make_tasks import main as make_tasks
from deskrl.actor.miniwob.page_run import read_end
from deskrl.actor.task import Task
from deskrl.actor.tasks.audit import audit
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_lists import load_list
from deskrl.core.config import DesktopConfig, RunConfig

WHEEL = os.environ.get("MINIWOB_WHEEL", "")
MISSING = missing_packages(applications=False)

pytestmark = [
    pytest.mark.skipif(not WHEEL, reason="MINIWOB_WHEEL is not set"),
    pytest.mark.skipif(bool(MISSING) or find_browser() is None, reason=f"packages missing: {MISSING or 'chromium'}"),
]
SCALE = 3
QUERY_BOX = """
(() => { const box = document.querySelector(SELECTOR).getBoundingClientRect();
         return [box.left + box.width / 2, box.top + box.height / 2]; })()
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("miniwob")
    make_tasks(folder, Path(WHEEL))
    return {task.id: task for task in load_list(folder / "train.json")}


def run_on_a_desktop(use: Callable[[Desktop], Awaitable[None]]) -> None:
    async def scenario(root: Path) -> None:
        desktop = make_desktop(DesktopConfig(), "miniwob", root / "desktops")
        try:
            await use(desktop)
        finally:
            await desktop.close()

    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        asyncio.run(scenario(Path(folder)))


async def centre(desktop: Desktop, selector: str) -> tuple[int, int]:
    """Return the centre of an element in pixels of the screen."""
    (target,) = [t for t in (await desktop.call_browser("Target.getTargets", {}))["targetInfos"] if t["type"] == "page"]
    attached = await desktop.call_browser("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
    arguments = {"expression": QUERY_BOX.replace("SELECTOR", repr(selector)), "returnByValue": True}
    found = await desktop.call_browser("Runtime.evaluate", arguments, attached["sessionId"])
    x, y = found["result"]["value"]
    return round(SCALE * x), round(SCALE * y)


async def click(desktop: Desktop, selector: str) -> None:
    x, y = await centre(desktop, selector)
    await desktop.act(Action(ActionKind.CLICK, x=x, y=y))
    await desktop.settle()


async def reward(desktop: Desktop) -> float | None:
    end = await read_end(desktop)
    return None if end is None else end.raw_reward


def test_at_least_100_pages_start_with_the_instruction_of_their_seed(tasks: dict[str, Task]) -> None:
    instructions: dict[str, list[str]] = {}

    async def use(desktop: Desktop) -> None:
        for name, task in tasks.items():
            for seed in (5, 5):
                await desktop.reset()
                instructions.setdefault(name, []).append(await setup_task(desktop, task, seed))
                assert await read_end(desktop) is None, name

    run_on_a_desktop(use)
    assert len(instructions) >= 100
    assert [name for name, (first, second) in instructions.items() if not first or first != second] == []


def test_a_dragged_element_is_where_it_was_released(tasks: dict[str, Task]) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.reset()
        await setup_task(desktop, tasks["drag-box"], 2)
        (x, y), (end_x, end_y) = [await centre(desktop, f"#draggable{size}") for size in ("Small", "Large")]
        await desktop.act(Action(ActionKind.DRAG, x=x, y=y, end_x=end_x, end_y=end_y))
        await desktop.settle()
        await click(desktop, "#subbtn")
        assert await reward(desktop) == 1.0

    run_on_a_desktop(use)


def test_a_page_with_a_canvas_accepts_one_answer(tasks: dict[str, Task]) -> None:
    rewards = []

    async def use(desktop: Desktop) -> None:
        for number in range(1, 6):
            await desktop.reset()
            await setup_task(desktop, tasks["count-sides"], 2)
            screenshot = await desktop.settle()
            drawing = screenshot.crop((0, 150, 480, 480)).convert("L")
            assert drawing.getextrema()[0] < 64, "nothing is drawn"
            await click(desktop, f"#form button:nth-of-type({number})")
            rewards.append(await reward(desktop))

    run_on_a_desktop(use)
    assert sorted(rewards, key=str) == [-1.0, -1.0, -1.0, -1.0, 1.0]


@pytest.mark.timeout(6 * 3600)
def test_no_cheat_is_rewarded_by_any_page(tasks: dict[str, Task]) -> None:
    attempts = asyncio.run(audit(list(tasks.values()), RunConfig(desktop=DesktopConfig(num_envs=4))))
    assert [attempt for attempt in attempts if attempt.verdict in ("rewarded", "fault")] == []
