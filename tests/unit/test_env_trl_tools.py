"""Tools for TRL's trainer, on simulated desktops: what the model gets, the reward, and faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.desktops.base import DesktopGone
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.errors import UserError
from deskrl.env.desktop_fault import DesktopFault
from deskrl.env.trl_tools import DesktopTools, tool_factory, training_rows

DESKTOP = {"provider": "simulated", "simulated": {"time_scale": 1e-9, "hang_rate": 0.0}, "width": 560, "height": 280}
ENDED = [{"type": "text", "text": "The task has ended."}]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {"runs": str(tmp_path), "desktop": DESKTOP}


@pytest.fixture
def tools(values: dict[str, Any]) -> Iterator[DesktopTools]:
    tools = tool_factory(values)()
    yield tools
    tools._desktop.close()


def test_a_model_gets_the_instruction_and_screenshots_and_the_reward_is_that_of_the_task(tools: DesktopTools) -> None:
    image, text = tools.reset(seed=1, task="type-amber", prompt=[], column="not used")
    assert image["type"] == "image" and image["image"].size == (560, 280)
    assert text == {"type": "text", "text": "Type the word amber."}
    (typed,) = tools.type_text("amber")
    assert typed["type"] == "image" and typed["image"] != image["image"]
    assert tools.finish() == ENDED and tools.click(1, 1) == ENDED
    assert tools.get_reward() == 1.0 and tools.get_reward() == 1.0


def test_an_episode_that_the_model_does_not_finish_is_evaluated(tools: DesktopTools) -> None:
    tools.reset(seed=1, task="type-amber")
    tools.type_text("amber")
    assert tools.get_reward() == 1.0
    tools.reset(seed=1, task="type-amber")
    assert tools.get_reward() == 0.0
    tools.reset(seed=1, task="type-amber")
    assert tools.give_up() == ENDED and tools.get_reward() == 0.0


def test_every_tool_is_one_action(tools: DesktopTools, monkeypatch: pytest.MonkeyPatch) -> None:
    acted: list[dict[str, Any]] = []

    async def act(desktop: SimulatedDesktop, action: Any) -> None:
        acted.append(action.to_record())

    monkeypatch.setattr(SimulatedDesktop, "act", act)
    tools.reset(seed=1)
    tools.click(1, 2, count=2)
    tools.click(1, 2, button="right")
    tools.drag(1, 2, 3, 4)
    tools.scroll(1, 2, down=-3)
    tools.hotkey(["ctrl", "s"])
    tools.wait(0.5)
    assert acted == [
        {"kind": "double_click", "x": 1, "y": 2},
        {"kind": "right_click", "x": 1, "y": 2},
        {"kind": "drag", "x": 1, "y": 2, "end_x": 3, "end_y": 4},
        {"kind": "scroll", "x": 1, "y": 2, "scroll_y": -3},
        {"kind": "hotkey", "keys": ["ctrl", "s"]},
        {"kind": "wait", "seconds": 0.5},
    ]


def test_an_error_in_a_call_is_raised_for_the_model_and_the_episode_continues(tools: DesktopTools) -> None:
    tools.reset(seed=1, task="type-amber")
    for call in (lambda: tools.click(560, 1), lambda: tools.hotkey(["frob"])):
        with pytest.raises(UserError):
            call()
    with pytest.raises(ValueError, match="no click with button 'right' and count 2"):
        tools.click(1, 1, button="right", count=2)
    tools.type_text("amber")
    assert tools.get_reward() == 1.0


def test_a_fault_in_a_tool_is_raised_where_the_trainer_asks_for_the_reward(
    tools: DesktopTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cause(desktop: SimulatedDesktop) -> str:
        return "the machine ended it"

    async def act(desktop: SimulatedDesktop, action: Any) -> None:
        raise DesktopGone("it is gone")

    tools.reset(seed=1, task="type-amber")
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedDesktop, "death_cause", cause)
        patch.setattr(SimulatedDesktop, "act", act)
        assert tools.type_text("amber") == ENDED
    with pytest.raises(DesktopFault, match="the machine ended it"):
        tools.get_reward()
    tools.reset(seed=1, task="type-amber")
    assert tools.get_reward() == 0.0


def test_rows_of_a_dataset_let_the_tasks_take_turns_with_distinct_seeds(values: dict[str, Any]) -> None:
    rows = training_rows(6, values)
    assert [row["task"] for row in rows[:4]] == ["type-amber", "type-birch", "type-cedar", "type-delta"]
    assert rows[4]["task"] == "type-amber" and len({row["seed"] for row in rows}) == 6
    assert rows == training_rows(6, values)


def test_an_unknown_task_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="type-umber"):
        tool_factory({"runs": str(tmp_path), "desktop": DESKTOP, "tasks": {"ids": ["type-umber"]}})
