"""Layout of demonstrations on disk."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstrations import (
    Demonstration,
    DemonstrationStep,
    Player,
    create_folder,
    find_demonstrations,
    read_demonstration,
    read_screenshot,
    screenshot_name,
    write_demonstration,
    write_screenshot,
)
from deskrl.core.errors import UserError

SIZE = (64, 48)


def png(size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "navy").save(buffer, "PNG")
    return buffer.getvalue()


def demonstration() -> Demonstration:
    """Demonstration in which the person clicks, the policy types, and the person ends the episode."""
    click = Action(ActionKind.CLICK, x=63, y=47, keys=("ctrl",))
    typed = Action(ActionKind.TYPE, text="Größe\n")
    return Demonstration(
        task_id="fold",
        application="os",
        instruction="Fold it.",
        task={"id": "fold"},
        seed=2**40,
        screen_size=SIZE,
        source="deskrl record",
        deskrl_version="0.1.0",
        recorded_unix_s=1.5,
        reward=0.5,
        evidence={"found": 1},
        termination="finished",
        steps=(
            DemonstrationStep(click, Player.PERSON, screenshot_name(0), 0.25),
            DemonstrationStep(typed, Player.POLICY, screenshot_name(1), 1.0, "I type the name."),
            DemonstrationStep(Action(ActionKind.FINISHED), Player.PERSON, screenshot_name(2), 2.0),
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a written demonstration."""
    folder = tmp_path / "demonstrations" / "fold-1"
    create_folder(folder)
    for number in range(3):
        write_screenshot(folder, number, png())
    write_demonstration(folder, demonstration())
    return folder


def change(folder: Path, **values: Any) -> None:
    """Replace keys of demonstration.json."""
    path = folder / "demonstration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_demonstration_is_read_as_it_was_written(folder: Path) -> None:
    read = read_demonstration(folder)
    assert read == demonstration()
    assert [read_screenshot(folder, read, step.screenshot) for step in read.steps] == [png()] * 3


def test_an_episode_without_a_reward_says_why(folder: Path) -> None:
    written = replace(demonstration(), reward=None, termination="", fault="the desktop was lost")
    write_demonstration(folder, written)
    assert read_demonstration(folder) == written


def test_a_folder_that_exists_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UserError, match=f"{folder}: exists"):
        create_folder(folder)


def test_demonstrations_are_found_below_a_folder_and_in_it(folder: Path) -> None:
    assert find_demonstrations(folder) == find_demonstrations(folder.parents[1]) == [folder]
    with pytest.raises(UserError, match="contains no demonstrations"):
        find_demonstrations(folder / "screenshots")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "format version 2, not 1"),
        ({"reward": "1"}, r"not a demonstration: .*reward"),
        ({"reward": 1.5}, "reward: 1.5 is not between 0 and 1"),
        ({"screen_size": [32, 48]}, r"steps\[0\]: the action is outside the screen of 32 x 48 pixels"),
        ({"final_screenshot": "screenshots/0009.png"}, "screenshots/0009.png does not exist"),
        ({"final_screenshot": "../0000.png"}, "'../0000.png' cannot be the name of a screenshot"),
        ({"steps": [{"action": {"kind": "jump"}}]}, "not a demonstration: .*jump"),
    ],
)
def test_an_invalid_demonstration_is_rejected_by_name(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(UserError, match=message) as raised:
        read_demonstration(folder)
    assert str(folder / "demonstration.json") in str(raised.value)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"kind": "hotkey", "keys": ["nonsense"]}, r"steps\[0\]: unknown key 'nonsense'"),
        ({"kind": "wait", "seconds": -1}, r"steps\[0\]: -1 s, 1 times"),
        ({"kind": "hotkey", "keys": ["a"], "repeat": 0}, r"steps\[0\]: 0 s, 0 times"),
    ],
)
def test_an_action_that_no_desktop_can_execute_is_rejected(folder: Path, action: dict[str, Any], message: str) -> None:
    steps = json.loads((folder / "demonstration.json").read_text())["steps"]
    change(folder, steps=[steps[0] | {"action": action}, *steps[1:]])
    with pytest.raises(UserError, match=message):
        read_demonstration(folder)


@pytest.mark.parametrize("linked", ["screenshots/0000.png", "screenshots"])
def test_a_link_to_screenshots_outside_the_folder_is_not_followed(folder: Path, linked: str) -> None:
    outside = folder.parent / "private"
    (folder / linked).rename(outside)
    (folder / linked).symlink_to(outside)
    with pytest.raises(UserError, match=r"screenshots/0000.png is a link to a file outside the folder"):
        read_demonstration(folder)


def test_a_file_without_an_end_or_of_unbounded_depth_is_rejected(folder: Path) -> None:
    path = folder / "demonstration.json"
    text = path.read_text()
    path.write_text(text.replace('"found": 1', '"found": ' + "[" * 40_000 + "]" * 40_000))
    with pytest.raises(UserError, match=r"not a demonstration: .*recursion"):
        read_demonstration(folder)
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.unlink()
        make()
        with pytest.raises(UserError, match=r"demonstration\.json: cannot be read: Not a regular file"):
            read_demonstration(folder)


def test_an_action_after_the_end_is_rejected(folder: Path) -> None:
    steps = json.loads((folder / "demonstration.json").read_text())["steps"]
    change(folder, steps=steps[::-1])
    with pytest.raises(UserError, match=r"steps\[0\]: finished is not the last action"):
        read_demonstration(folder)


def test_a_screenshot_of_another_size_or_a_damaged_one_is_rejected(folder: Path) -> None:
    read = read_demonstration(folder)
    (folder / screenshot_name(0)).write_bytes(png((32, 32)))
    (folder / screenshot_name(1)).write_bytes(png()[:-20])
    with pytest.raises(UserError, match="32 x 32 pixels, but the screen has 64 x 48"):
        read_screenshot(folder, read, screenshot_name(0))
    with pytest.raises(UserError, match=r"0001\.png: the image is incomplete"):
        read_screenshot(folder, read, screenshot_name(1))
