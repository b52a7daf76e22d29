"""Demonstrations as the policy of a run would have seen and written them, for the learner's warm start."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstration_rendering import render_demonstrations
from deskrl.actor.demonstrations import (
    Demonstration,
    DemonstrationStep,
    Player,
    create_folder,
    write_demonstration,
    write_screenshot,
)
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.imitation_data import ImitationData
from deskrl.core.run_dir import RunDir
from deskrl.proto.v1 import inference_pb2

SIZE = (200, 100)
CLICK = Action(ActionKind.CLICK, x=100, y=50)
FINISHED = Action(ActionKind.FINISHED)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (number, 0, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write(source: Path, name: str, actions: Sequence[Action], **values: Any) -> Path:
    """Write a demonstration with these actions, each with its own screenshot and thought."""
    folder = source / name
    create_folder(folder)
    steps = [
        DemonstrationStep(
            action, Player.PERSON, write_screenshot(folder, number, picture(number)), 0.0, f"I do {number}."
        )
        for number, action in enumerate(actions)
    ]
    demonstration = Demonstration(
        task_id=name,
        instruction="Fold it.",
        task={},
        seed=0,
        screen_size=SIZE,
        source="test",
        deskrl_version="0",
        steps=tuple(steps),
        reward=1.0,
        termination="finished",
    )
    write_demonstration(folder, replace(demonstration, **values))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "runs": tmp_path / "runs",
            "tasks": {"max_steps": 3},
            "agent": {"action_language": "ui_tars_2", "context": "episode"},
        }
    )


def data(config: RunConfig) -> ImitationData:
    return ImitationData(RunDir(config.run_dir).demonstrations)


def texts(messages: Sequence[bytes]) -> list[str]:
    """Return the content of each message: its text, or the hash of its screenshot."""
    contents = [inference_pb2.ChatMessage.FromString(message).contents[0] for message in messages]
    return [content.text or content.image_hash for content in contents]


def test_a_step_has_the_conversation_up_to_the_demonstrated_response(source: Path, config: RunConfig) -> None:
    write(source, "fold", [CLICK, FINISHED])
    left_out = render_demonstrations(config, source)
    assert (left_out.count("demonstration"), left_out.count("step")) == (0, 0)
    (found,) = [data(config).read(index) for index in range(len(data(config)))]
    first, second = found.steps
    assert (found.task_id, first.index, second.index) == ("fold", 0, 1)
    assert first.text == "<think>I do 0.</think>\nAction: click(point='<point>500 500</point>')"
    assert second.text == "<think>I do 1.</think>\nAction: finished()"
    shots = [image_hash(picture(number)) for number in range(2)]
    _, prompt, *turns = texts(second.messages)
    assert "Fold it." in prompt
    assert turns == [shots[0], first.text, shots[1], second.text]
    assert second.images == tuple(shots)
    assert data(config).read_images([*shots, "0" * 64]) == {name: picture(n) for n, name in enumerate(shots)}


def test_a_step_has_the_screenshots_of_the_context(source: Path, config: RunConfig) -> None:
    agent = config.agent.model_copy(update={"context": "segment", "segment_images": (1, 2)})
    config = config.model_copy(update={"agent": agent})
    write(source, "fold", [CLICK, CLICK, FINISHED])
    render_demonstrations(config, source)
    shots = [image_hash(picture(number)) for number in range(3)]
    steps = data(config).read(0).steps
    assert [step.images for step in steps] == [(shots[0],), (shots[0], shots[1]), (shots[2],)]
    assert [text for text in texts(steps[2].messages) if text in shots] == [shots[2]]


def test_screenshots_are_scaled_as_for_the_policy(source: Path, config: RunConfig) -> None:
    agent = config.agent.model_copy(update={"image_width": 100, "image_height": 50})
    config = config.model_copy(update={"agent": agent})
    write(source, "fold", [CLICK])
    render_demonstrations(config, source)
    (step,) = data(config).read(0).steps
    (image,) = data(config).read_images(step.images).values()
    assert Image.open(io.BytesIO(image)).size == (100, 50)


@pytest.mark.parametrize(
    "action",
    [
        Action(ActionKind.MIDDLE_CLICK, x=1, y=1),
        Action(ActionKind.CLICK, x=1, y=1, keys=("ctrl",)),
        Action(ActionKind.HOTKEY, keys=("a",), repeat=3),
    ],
)
def test_an_action_that_the_language_cannot_express_is_left_out(
    source: Path, config: RunConfig, action: Action, capsys: pytest.CaptureFixture[str]
) -> None:
    write(source, "fold", [CLICK, action, FINISHED])
    left_out = render_demonstrations(config, source)
    assert left_out.reasons("step") == {"the action language of the run cannot express it": 1}
    assert f"fold step 1 ({action.kind})" in capsys.readouterr().out
    (found,) = [data(config).read(0)]
    assert [step.action["kind"] for step in found.steps] == ["click", "finished"]
    assert len(found.steps[1].images) == 2, "the screenshot of the step is left out with it"


def test_failures_damage_and_surplus_steps_are_left_out(source: Path, config: RunConfig) -> None:
    write(source, "a-long", [CLICK] * 5)
    write(source, "failed", [FINISHED], reward=0.05)
    write(source, "unjudged", [FINISHED], reward=None, fault="stopped")
    write(source, "unknown", [Action(ActionKind.MIDDLE_CLICK)])
    damaged = write(source, "damaged", [FINISHED])
    (damaged / "screenshots" / "0000.png").write_bytes(b"")
    left_out = render_demonstrations(config, source)
    assert left_out.reasons("demonstration") == {
        "its reward is not above the success threshold": 2,
        "it is damaged": 1,
        "none of its steps can be imitated": 1,
    }
    assert left_out.reasons("step")["the episode has more steps than tasks.max_steps"] == 2
    assert [len(data(config).read(index).steps) for index in range(len(data(config)))] == [3]


def test_a_resumed_run_keeps_its_demonstrations_until_the_configuration_changes(
    source: Path, config: RunConfig
) -> None:
    write(source, "fold", [CLICK, FINISHED])
    render_demonstrations(config, source)
    write(source, "second", [FINISHED])
    render_demonstrations(config, source)
    assert len(data(config)) == 1
    agent = config.agent.model_copy(update={"language": "French"})
    config = config.model_copy(update={"agent": agent})
    render_demonstrations(config, source)
    assert len(data(config)) == 2


def test_nothing_to_imitate_is_an_error(source: Path, config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"learner\.warm_start\.demonstrations: .* contains no demonstrations"):
        render_demonstrations(config, source)
    write(source, "failed", [FINISHED], reward=0.0)
    with pytest.raises(UserError, match=r"learner\.warm_start\.demonstrations: .* none can be imitated"):
        render_demonstrations(config, source)
    with pytest.raises(UserError, match="not found"):
        data(config)


def test_missing_and_damaged_files_of_the_run_are_named(source: Path, config: RunConfig) -> None:
    write(source, "fold", [FINISHED])
    render_demonstrations(config, source)
    path = RunDir(config.run_dir).demonstrations / "000000.msgpack"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"000000\.msgpack: damaged"):
        data(config).read(0)
    path.unlink()
    with pytest.raises(UserError, match="demonstrations are missing"):
        data(config)
    facts = RunDir(config.run_dir).demonstrations / "complete.json"
    assert json.loads(facts.read_text())["num_demonstrations"] == 1
