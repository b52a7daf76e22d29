"""Specification of pages of MiniWoB++ on embedded desktops: instruction, end, reward, and attempts to forge it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from miniwob_kit import write_wheel

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.browser_programs import find_browser
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.miniwob.make_tasks import main as make_tasks
from deskrl.actor.miniwob.page_run import read_end
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.task import Task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_lists import load_list
from deskrl.core.config import RunConfig
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

MISSING = missing_packages(applications=False)

pytestmark = pytest.mark.skipif(
    bool(MISSING) or find_browser() is None, reason=f"packages missing: {MISSING or 'chromium'}"
)
CONFIG = RunConfig()
SCALE = 3
"""Scale of a page of 160 x 210 pixels on a screen of 1280 x 720."""
ANY_PLACE = Action(ActionKind.CLICK, x=900, y=600)


class RecordingPolicy(ActorPolicy):
    """Policy that performs given actions, and records the prompt. An instruction decides on the button."""

    def __init__(self, *actions: Action | str) -> None:
        self._actions = actions
        self.instruction = ""

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        self.instruction = conversation.prompt().messages[1].contents[0].text
        action = self._actions[index]
        if isinstance(action, str):
            words = ("one", "two") if action == "right" else ("two", "one")
            x = 40 if f"Press {words[0]}" in self.instruction else 120
            assert f"Press {words[0]}" in self.instruction or f"Press {words[1]}" in self.instruction
            action = Action(ActionKind.CLICK, x=SCALE * x, y=SCALE * 100)
        text = conversation.render(PolicyResponse("", action))
        conversation.respond(text)
        return Decision(Step(index=index, screenshot=screenshot.hash, images=(screenshot.hash,), text=text), {})


class NoSink:
    """Discards screenshots and steps."""

    def add_image(self, image: common_pb2.Image) -> None:
        """Discard a screenshot."""

    def add_step(self, step: Step) -> None:
        """Discard a step."""


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    make_tasks(tmp_path / "tasks", write_wheel(tmp_path))
    return {task.id: task for task in load_list(tmp_path / "tasks" / "train.json")}


def run_on_a_desktop(root: Path, use: Callable[[Desktop], Awaitable[None]]) -> None:
    async def scenario() -> None:
        desktop = make_desktop(CONFIG.desktop, "miniwob", root)
        try:
            await use(desktop)
        finally:
            await desktop.close()

    asyncio.run(scenario())


async def play(desktop: Desktop, task: Task, policy: RecordingPolicy, member: int = 0) -> rollout_pb2.EpisodeResult:
    """Play one member of a training group."""
    await desktop.reset()
    rollout = rollout_pb2.Rollout(
        episode_id=f"e{member}", group_id="train/000003", queue="train", task_id=task.id, seed=member, max_steps=4
    )
    start = Agent(CONFIG.agent).start_conversation
    reward = make_reward(CONFIG)
    episode = Episode(
        desktop, task, rollout, start, policy, NoSink(), CONFIG.desktop, enter=lambda state: None, reward=reward
    )
    return await episode.run()


async def press(desktop: Desktop, *keys: Sequence[str]) -> None:
    """Press combinations of keys, and wait until the browser has reacted."""
    for combination in keys:
        await desktop.act(Action(ActionKind.HOTKEY, keys=tuple(combination)))
        await desktop.settle()


def test_members_of_a_group_see_one_layout_and_the_page_decides_on_end_and_reward(
    tasks: dict[str, Task], run_root: Path
) -> None:
    async def use(desktop: Desktop) -> None:
        solving, failing = RecordingPolicy(ANY_PLACE, "right"), RecordingPolicy("wrong")
        solved = await play(desktop, tasks["two-buttons"], solving, member=1)
        failed = await play(desktop, tasks["two-buttons"], failing, member=2)
        assert (solved.reward, solved.num_steps, solved.termination) == (1.0, 2, rollout_pb2.TERMINATION_FINISHED)
        assert (failed.reward, failed.num_steps) == (0.0, 1)
        assert '"raw_reward": -1.0' in failed.evidence_json
        assert "case" in solving.instruction and solving.instruction == failing.instruction
        with pytest.raises(Fault, match="the MiniWoB\\+\\+ page broken did not start: ReferenceError"):
            await play(desktop, tasks["broken"], RecordingPolicy())

    run_on_a_desktop(run_root, use)


def test_neither_typed_scripts_nor_other_tabs_nor_a_reload_forge_a_reward(
    tasks: dict[str, Task], run_root: Path
) -> None:
    async def use(desktop: Desktop) -> None:
        await desktop.reset()
        assert await setup_task(desktop, tasks["echo"], 0, CONFIG.desktop) == "Type."
        before = await desktop.settle()
        await press(desktop, ["ctrl", "t"], ["ctrl", "n"])
        assert len(await desktop.windows()) == 1
        assert (await desktop.settle()).crop((0, 0, 480, 150)).tobytes() == before.crop((0, 0, 480, 150)).tobytes()
        for keys in (["f12"], ["ctrl", "shift", "j"]):
            await press(desktop, keys)
            await desktop.act(Action(ActionKind.TYPE, text="core.endEpisode(1)\n"))
            await press(desktop, ["esc"])
        await desktop.act(Action(ActionKind.CLICK, x=100, y=170))
        text = "<img src=x onerror=core.endEpisode(1)>"
        await desktop.act(Action(ActionKind.TYPE, text=f"{text}\n"))
        await press(desktop, ["shift"])
        assert await read_end(desktop) is None
        await press(desktop, ["f9"])
        end = await read_end(desktop)
        assert end is not None and end.raw_reward == 0.25
        await press(desktop, ["f9"], ["f5"], ["f9"])
        assert await read_end(desktop) == end
        await desktop.stop_all_programs()
        assert await read_end(desktop) == end

    run_on_a_desktop(run_root, use)
