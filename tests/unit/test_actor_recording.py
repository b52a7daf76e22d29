"""Recordings: what is saved of an episode that a person plays, and how it ends. The desktops are simulated."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.conversation import Conversation
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.demonstrations import Demonstration, Player, create_folder, read_demonstration, read_screenshot
from deskrl.actor.desktops.base import DesktopGone
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.actor.person_input import read_action
from deskrl.actor.recording import Phase, Recording
from deskrl.actor.tasks.task_choice import select_task
from deskrl.actor.tasks.task_schema import OWN_SUITE, SIMULATED_SUITE
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2

TASK = "type-amber"
SOLUTION = Action(ActionKind.TYPE, text="amber")
FINISHED = Action(ActionKind.FINISHED)
TIMEOUT_S = 60


def simulated_config(**tasks: Any) -> RunConfig:
    """Configuration with a simulated desktop without latencies, on which no episode succeeds by chance."""
    desktop = {"provider": "simulated", "simulated": {"time_scale": 1e-6}}
    return RunConfig.model_validate({"desktop": desktop, "tasks": tasks, "seed": 3})


class TypingPolicy(ActorPolicy):
    """Policy that solves the task."""

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        text = "Thought: I write it.\nAction: type(content='amber')"
        conversation.respond(text)
        return Decision(Step(index, screenshot.hash, (screenshot.hash,), text), {})


def record(
    folder: Path,
    play: Callable[[Recording], Awaitable[None]],
    *,
    policy: ActorPolicy | None = None,
    make: Callable[..., SimulatedDesktop] = SimulatedDesktop,
    starts_with: Phase = Phase.PLAYING,
    **tasks: Any,
) -> Demonstration | None:
    """Record a demonstration that `play` plays as the person, beginning in the phase `starts_with`."""
    task, config = select_task(simulated_config(**tasks), TASK)
    create_folder(folder)

    async def scenario() -> Demonstration | None:
        opener = None if policy is None else (lambda rollout: policy)
        recording = Recording(config, task, make(config.desktop, "desktop"), folder, opener)
        async with asyncio.timeout(TIMEOUT_S):
            running = asyncio.create_task(recording.run())
            await until(recording, lambda: recording.state.phase is starts_with)
            await until(recording, lambda: starts_with is not Phase.PLAYING or recording.state.screen > 0)
            await play(recording)
            return await running

    return asyncio.run(scenario())


async def until(recording: Recording, condition: Callable[[], bool]) -> None:
    """Wait until a condition on the state of a recording is true."""
    while not condition():
        await recording.wait_for_change(recording.state.version, TIMEOUT_S)


async def solve(recording: Recording) -> None:
    recording.act(SOLUTION)
    recording.act(FINISHED)


def test_a_demonstration_has_the_persons_actions_with_screenshots_and_the_tasks_reward(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    demonstration = record(folder, solve)
    assert demonstration is not None
    assert demonstration == read_demonstration(folder)
    assert [step.action for step in demonstration.steps] == [SOLUTION, FINISHED]
    assert {step.player for step in demonstration.steps} == {Player.PERSON}
    assert (demonstration.reward, demonstration.termination, demonstration.seed) == (1.0, "finished", 3)
    assert (demonstration.task_id, demonstration.source) == (TASK, "deskrl record")
    before, after = [read_screenshot(folder, demonstration, step.screenshot) for step in demonstration.steps]
    assert before != after and demonstration.final_screenshot is None
    times_s = [step.time_s for step in demonstration.steps]
    assert times_s == sorted(times_s) and times_s[0] >= 0


def test_a_policy_plays_after_the_person_has_handed_over(tmp_path: Path) -> None:
    async def play(recording: Recording) -> None:
        recording.hand_over()
        await until(recording, lambda: bool(recording.state.steps))
        recording.act(FINISHED)

    demonstration = record(tmp_path / "out", play, policy=TypingPolicy(), max_steps=100)
    assert demonstration is not None and demonstration.reward == 1.0
    first, last = demonstration.steps[0], demonstration.steps[-1]
    assert (first.player, first.thought, first.action) == (Player.POLICY, "I write it.", SOLUTION)
    assert (last.player, last.action) == (Player.PERSON, FINISHED)


def test_an_episode_at_the_step_limit_is_judged_and_has_the_screenshot_of_its_end(tmp_path: Path) -> None:
    async def play(recording: Recording) -> None:
        recording.act(SOLUTION)

    demonstration = record(tmp_path / "out", play, max_steps=1)
    assert demonstration is not None
    assert (demonstration.reward, demonstration.termination) == (1.0, "step_limit")
    assert demonstration.final_screenshot == "screenshots/0001.png"
    read_screenshot(tmp_path / "out", demonstration, demonstration.final_screenshot)


def test_a_stopped_recording_is_saved_without_a_reward(tmp_path: Path) -> None:
    async def play(recording: Recording) -> None:
        recording.act(SOLUTION)
        await until(recording, lambda: bool(recording.state.steps) and not recording.state.is_acting)
        recording.stop()

    demonstration = record(tmp_path / "out", play)
    assert demonstration is not None and demonstration == read_demonstration(tmp_path / "out")
    assert (demonstration.reward, demonstration.termination) == (None, "")
    assert "stopped" in demonstration.fault and len(demonstration.steps) == 1


class HangingDesktop(SimulatedDesktop):
    """Desktop that hangs at one point."""

    hangs_in = "reset"

    async def reset(self) -> None:
        await self._hang_in("reset")
        await super().reset()

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        await self._hang_in("settle")
        return await super().settle(min_quiet_s)

    async def _hang_in(self, method: str) -> None:
        if method == self.hangs_in:
            await asyncio.Event().wait()


class SlowlySetUpDesktop(HangingDesktop):
    hangs_in = "settle"


@pytest.mark.parametrize(("make", "phase"), [(HangingDesktop, Phase.STARTING), (SlowlySetUpDesktop, Phase.SETTING_UP)])
@pytest.mark.parametrize("is_discarded", [False, True])
def test_a_recording_that_ends_before_the_first_step_leaves_nothing(
    tmp_path: Path, make: type[SimulatedDesktop], phase: Phase, is_discarded: bool
) -> None:
    ended: list[Recording] = []

    async def play(recording: Recording) -> None:
        await asyncio.sleep(0)  # the desktop begins to start
        recording.discard() if is_discarded else recording.stop()
        ended.append(recording)

    demonstration = record(tmp_path / "out", play, make=make, starts_with=phase)
    assert (demonstration is None) == is_discarded
    if demonstration is not None:
        assert demonstration.steps == () and "stopped" in demonstration.fault
    assert (ended[0].state.phase, ended[0].state.folder) == (Phase.ENDED, "")
    assert list(tmp_path.iterdir()) == []


def test_a_recording_whose_process_is_killed_keeps_the_steps_that_were_played(tmp_path: Path) -> None:
    found: list[Demonstration] = []

    async def play(recording: Recording) -> None:
        recording.act(SOLUTION)
        await until(recording, lambda: bool(recording.state.steps))
        found.append(read_demonstration(tmp_path / "out"))
        recording.act(FINISHED)

    record(tmp_path / "out", play)
    assert [step.action for step in found[0].steps] == [SOLUTION]
    assert (found[0].reward, found[0].fault) == (None, "the recording was interrupted")


@pytest.mark.parametrize("num_saved", [0, 1])
def test_a_full_disk_ends_the_recording_and_keeps_the_steps_before(tmp_path: Path, num_saved: int) -> None:
    folder = tmp_path / "out"

    async def play(recording: Recording) -> None:
        (folder / f"screenshots/{num_saved:04d}.png").mkdir()  # in place of a disk that is full by then
        for _ in range(num_saved + 1):
            recording.act(SOLUTION)

    if num_saved == 0:
        with pytest.raises(UserError, match=r"0000\.png: cannot be written: Is a directory"):
            record(folder, play)
        assert list(tmp_path.iterdir()) == []
        return
    demonstration = record(folder, play)
    assert demonstration is not None and demonstration == read_demonstration(folder)
    assert [step.action for step in demonstration.steps] == [SOLUTION] and demonstration.reward is None
    assert demonstration.fault == f"{folder}/screenshots/0001.png: cannot be written: Is a directory"


def test_a_discarded_recording_leaves_nothing(tmp_path: Path) -> None:
    async def play(recording: Recording) -> None:
        recording.act(SOLUTION)
        recording.discard()

    assert record(tmp_path / "out", play) is None
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_desktop_is_no_reward_of_0(tmp_path: Path) -> None:
    class DyingDesktop(SimulatedDesktop):
        async def act(self, action: Action) -> None:
            await self.close()
            raise DesktopGone("the host has no memory")

        async def death_cause(self) -> str | None:
            return "killed by the host"

    demonstration = record(tmp_path / "out", solve, make=DyingDesktop)
    assert demonstration is not None and demonstration.reward is None
    assert demonstration.fault.startswith("killed by the host")
    assert [step.action for step in demonstration.steps] == [SOLUTION]


def test_a_defect_of_a_policy_ends_the_recording_but_loses_nothing(tmp_path: Path) -> None:
    class DefectivePolicy(TypingPolicy):
        async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
            raise KeyError("screenshot")

    async def play(recording: Recording) -> None:
        recording.act(SOLUTION)
        recording.hand_over()

    demonstration = record(tmp_path / "out", play, policy=DefectivePolicy())
    assert demonstration is not None and demonstration == read_demonstration(tmp_path / "out")
    assert (demonstration.reward, demonstration.fault) == (None, "KeyError: 'screenshot'")
    assert [step.action for step in demonstration.steps] == [SOLUTION]


def test_a_desktop_that_does_not_start_is_one_clear_error_and_leaves_no_folder(tmp_path: Path) -> None:
    class BrokenDesktop(SimulatedDesktop):
        async def reset(self) -> None:
            raise DesktopGone("no display")

    task, config = select_task(simulated_config(), TASK)
    create_folder(tmp_path / "out")

    async def scenario() -> None:
        await Recording(config, task, BrokenDesktop(config.desktop, "desktop"), tmp_path / "out").run()

    with pytest.raises(UserError, match="the desktop did not start: no display"):
        asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_the_live_screen_is_a_picture_of_the_whole_screen(tmp_path: Path) -> None:
    screens: list[bytes] = []

    async def play(recording: Recording) -> None:
        screens.append(recording.screen())
        recording.act(FINISHED)

    record(tmp_path / "out", play)
    assert Image.open(io.BytesIO(screens[0])).size == (1280, 720)


def test_actions_after_the_end_have_no_effect(tmp_path: Path) -> None:
    kept: list[Recording] = []

    async def play(recording: Recording) -> None:
        kept.append(recording)
        recording.act(FINISHED)

    record(tmp_path / "out", play)
    kept[0].act(SOLUTION)
    assert kept[0].state.num_waiting == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "jump"}, "not an action: .*jump"),
        ({"kind": "click", "x": "1"}, "not an action: .*x"),
        ({"kind": "click", "x": 1280}, "the point is outside the screen of 1280 x 720 pixels"),
        ({"kind": "drag", "x": 1, "end_y": -1}, "the point is outside the screen"),
        ({"kind": "hotkey", "keys": ["ctrl", "nonsense"]}, "unknown key: nonsense"),
        ({"kind": "hotkey"}, "no key"),
        ({"kind": "type"}, "text of 0 characters"),
        ({"kind": "wait", "seconds": 3600}, "a duration must be at most 60 s"),
        ({"kind": "hotkey", "keys": ["a"], "repeat": 1000}, "no action is repeated"),
        ({"kind": "scroll", "scroll_y": 101}, "more than 100 notches"),
        ("[", "not an action"),
        ('{"kind": "click", "more": ' + "[" * 40_000, "not an action: .*recursion"),
    ],
)
def test_an_action_that_cannot_be_executed_is_rejected(record: dict[str, Any] | str, message: str) -> None:
    data = record if isinstance(record, str) else json.dumps(record)
    with pytest.raises(ValueError, match=message):
        read_action(data.encode(), 1280, 720)


def test_keys_may_have_the_names_of_browsers() -> None:
    action = read_action(b'{"kind": "hotkey", "keys": ["Control", "ArrowLeft"]}', 1280, 720)
    assert action == Action(ActionKind.HOTKEY, keys=("ctrl", "left"))


def test_a_task_is_named_by_its_id_or_by_the_path_of_its_file(tmp_path: Path) -> None:
    path = next(SIMULATED_SUITE.glob(f"examples/*/{TASK}.json"))
    copy = tmp_path / "mine" / "any.json"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    by_id, config = select_task(simulated_config(), TASK)
    by_path, _ = select_task(simulated_config(), str(copy))
    assert (by_id.id, by_path.id, by_path.domain, config.tasks.ids) == (TASK, TASK, "mine", (TASK,))
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps({path.parent.name: [TASK]}))
    listed, _ = select_task(simulated_config(list=listing, root=SIMULATED_SUITE), TASK)
    assert listed.id == TASK


def test_a_task_that_cannot_be_played_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task fly .*choose from the 4 tasks of the suite"):
        select_task(simulated_config(), "fly")
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps({"os": [TASK]}))
    with pytest.raises(UserError, match=f"{listing}: no task fly"):
        select_task(simulated_config(list=listing, root=SIMULATED_SUITE), "fly")
    with pytest.raises(UserError, match="a simulated desktop cannot"):
        select_task(simulated_config(), str(OWN_SUITE / "examples/os/make-a-folder.json"))
