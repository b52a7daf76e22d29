"""Specification of environments as desktops: actions, place of the image, reward, images, and wrong options."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.environments import space_values
from deskrl.actor.environments.environment_options import EnvironmentOptions
from deskrl.actor.environments.environment_tasks import find_unmet
from deskrl.actor.environments.gestures import Gesture, check_table, fill, make_gesture
from deskrl.actor.environments.gymnasium_process import to_rgb
from deskrl.actor.environments.openenv_environment import schema_problem
from deskrl.actor.environments.openenv_image import decode_observation_image
from deskrl.actor.environments.screen_fit import ScreenFit
from deskrl.actor.environments.space_values import SpaceError, action_value, default_table
from deskrl.actor.image_decoding import ImageError
from deskrl.actor.materialize_tasks import load
from deskrl.actor.tasks.task_schema import ENVIRONMENT_SUITE, load_tasks
from deskrl.core.config import DesktopConfig, RunConfig
from deskrl.core.errors import UserError

SIZE = (200, 100)


def click_at(x: int, y: int) -> Gesture:
    return Gesture("click", {"x": x, "y": y}, SIZE)


def typed(text: str) -> Gesture:
    return Gesture("type", {"text": text}, SIZE)


# Gestures.


def test_a_key_press_is_named_by_its_keys_whatever_their_spelling() -> None:
    table = check_table({"press ArrowLeft": 0, "press Control+S": 1, "press plus": 2, "press page down": 3})
    assert list(table) == ["press left", "press ctrl+s", "press +", "press pagedown"]
    for keys, name in {("left",): "press left", ("ctrl", "s"): "press ctrl+s", ("+",): "press +"}.items():
        gesture = make_gesture(Action(ActionKind.HOTKEY, keys=keys), SIZE)
        assert gesture is not None and gesture.name == name


def test_values_of_an_action_replace_the_placeholders_of_its_template() -> None:
    table = check_table({"drag": {"from": ["{x}", "{y}"], "to": ["{end_x}", "{end_y}"], "name": "x"}})
    gesture = make_gesture(Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4), SIZE)
    assert gesture is not None
    assert fill(table["drag"], gesture) == {"from": [1, 2], "to": [3, 4], "name": "x"}


@pytest.mark.parametrize("point", [(-1, 5), (200, 5), (5, 100)])
def test_a_point_outside_of_the_image_has_no_gesture(point: tuple[int, int]) -> None:
    assert make_gesture(Action(ActionKind.CLICK, *point), SIZE) is None
    assert make_gesture(Action(ActionKind.DRAG, 5, 5, *point), SIZE) is None


@pytest.mark.parametrize("kind", [ActionKind.FINISHED, ActionKind.INFEASIBLE])
def test_the_end_of_an_episode_is_no_gesture(kind: ActionKind) -> None:
    assert make_gesture(Action(kind), SIZE) is None


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        ({"left": 0}, "'left' is not a gesture; known are click"),
        ({"finished": 0}, "'finished' is not a gesture"),
        ({"press lefd": 0}, "'lefd' is not a key"),
        ({"press ": 0}, "'' is not a key"),
        ({"click": ["{x}", "{text}"]}, r"click: has no placeholder {text}, but {x}, {y}"),
        ({"press a": "{x}"}, r"press a: has no placeholder {x}, but none"),
    ],
)
def test_a_table_of_actions_with_an_unknown_name_is_rejected(actions: dict[str, Any], reason: str) -> None:
    config = DesktopConfig(provider="gymnasium", provider_options={"id": "Any-v0", "actions": actions})
    with pytest.raises(UserError, match=f"desktop.provider_options.actions: .*{reason}"):
        select_provider(config)


# Action spaces of Gymnasium.


@pytest.mark.parametrize(
    ("space", "template", "gesture", "action"),
    [
        (spaces.Discrete(4), 3, typed(""), 3),
        (spaces.Discrete(3, start=-1), "{x}", click_at(199, 0), 1),
        (spaces.MultiDiscrete([2, 5]), ["{x}", "{y}"], click_at(100, 99), [1, 4]),
        (spaces.MultiBinary(3), [1, 0, 1], typed(""), [1, 0, 1]),
        (spaces.Box(-1, 1, (2,)), ["{x}", "{y}"], click_at(0, 99), [-1, 1]),
        (spaces.Box(0, np.array([199, 99]), (2,), np.int64), ["{x}", "{y}"], click_at(57, 31), [57, 31]),
        (spaces.Box(-np.inf, np.inf, (2,)), ["{x}", "{y}"], click_at(57, 31), [57, 31]),
        (spaces.Box(-2, 2, (1,)), [-1.5], typed(""), [-1.5]),
        (spaces.Box(-2, 2, (2, 2)), 1, typed(""), [[1, 1], [1, 1]]),
        (spaces.Text(5), "{text}", typed("abc"), "abc"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Text(5))), [1, "{text}"], typed("abc"), (1, "abc")),
    ],
)
def test_the_action_of_a_gesture_is_in_the_action_space(
    space: spaces.Space[Any], template: Any, gesture: Gesture, action: Any
) -> None:
    space_values.check_table(space, {gesture.name: template})
    value = action_value(space, template, gesture)
    assert space.contains(value)
    assert value == action if isinstance(action, str | tuple) else np.array_equal(value, action)


def test_a_table_of_spaces_is_filled_by_key() -> None:
    space = spaces.Dict(kind=spaces.Discrete(2), point=spaces.Box(0, 1, (2,)), text=spaces.Text(9, min_length=0))
    template = {"kind": 1, "point": ["{x}", "{y}"], "text": ""}
    space_values.check_table(space, {"click": template})
    value = action_value(space, template, click_at(199, 0))
    assert value is not None and value["kind"] == 1 and value["point"].tolist() == [1, 0] and value["text"] == ""


@pytest.mark.parametrize(
    ("space", "template", "gesture"),
    [
        (spaces.Text(2, charset="ab"), "{text}", typed("abab")),
        (spaces.Text(2, charset="ab"), "{text}", typed("c")),
        (spaces.Box(0, 3, (1,), np.uint8), ["{scroll_y}"], Gesture("scroll", {"scroll_y": -1}, SIZE)),
        (spaces.Discrete(3), "{scroll_y}", Gesture("scroll", {"scroll_y": 10**30}, SIZE)),
    ],
)
def test_values_that_the_action_space_does_not_contain_have_no_action(
    space: spaces.Space[Any], template: Any, gesture: Gesture
) -> None:
    space_values.check_table(space, {gesture.name: template})
    assert action_value(space, template, gesture) is None


@pytest.mark.parametrize(
    ("space", "table", "reason"),
    [
        (spaces.Discrete(2), {}, r"the action space Discrete\(2\) needs a table of actions"),
        (spaces.Discrete(2), {"press a": 2}, r"press a: 2 is not in the action space Discrete\(2\)"),
        (spaces.Discrete(2), {"press a": True}, "press a: True must be an integer"),
        (spaces.Discrete(2), {"type": "{text}"}, "type: {text} must be in a space of texts"),
        (spaces.Box(0, 1, (2,)), {"press a": [1]}, r"press a: \[1\] must have the shape \(2,\)"),
        (spaces.Box(0, 1, (2,)), {"press a": [1, "b"]}, "press a: 'b' must be a number"),
        (spaces.Box(0, 1, (2,)), {"press a": [1, 7]}, "is not in the action space"),
        (spaces.Dict(a=spaces.Discrete(2)), {"press a": {"b": 1}}, "must be a table with the keys a"),
        (spaces.Tuple([spaces.Discrete(2)]), {"press a": [1, 1]}, "must be an array of 1 values"),
        (spaces.Text(3), {"press a": "abcd"}, "is not in the action space"),
        (spaces.Sequence(spaces.Discrete(2)), {"press a": [1]}, "cannot be mapped"),
    ],
)
def test_a_table_that_does_not_fit_the_action_space_is_rejected(
    space: spaces.Space[Any], table: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SpaceError, match=reason):
        space_values.check_table(space, table)


def test_only_texts_and_bounded_points_have_actions_by_default() -> None:
    assert default_table(spaces.Text(5)) == {"type": "{text}"}
    assert default_table(spaces.Box(0, 1, (2,))) == {"click": ["{x}", "{y}"]}
    for space in (spaces.Discrete(2), spaces.Box(0, np.inf, (2,)), spaces.Box(0, 1, (3,))):
        assert default_table(space) == {}


# The screen.


@pytest.mark.parametrize(
    ("image_size", "screen_size", "box"),
    [
        ((64, 48), (1280, 720), (160, 0, 960, 720)),
        ((64, 48), (200, 100), (36, 2, 128, 96)),
        ((600, 400), (600, 400), (0, 0, 600, 400)),
        ((1000, 500), (100, 100), (0, 25, 100, 50)),
        ((3000, 1), (100, 100), (0, 49, 100, 1)),
    ],
)
def test_an_image_is_as_large_as_fits_with_equal_pixels_if_it_is_enlarged(
    image_size: tuple[int, int], screen_size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    fit = ScreenFit(image_size, screen_size)
    assert fit.box == box
    screen = fit.show(Image.new("RGB", image_size, "white"))
    left, top, width, height = box
    assert screen.size == screen_size
    assert screen.getbbox() == (left, top, left + width, top + height), "black beside the image"


def test_a_click_on_a_shown_pixel_is_one_on_that_pixel_of_the_image() -> None:
    fit = ScreenFit((64, 48), (200, 100))
    left, top, width, height = fit.box
    for x, y in ((0, 0), (31, 17), (63, 47)):
        shown = Action(ActionKind.CLICK, left + x * width // 64, top + y * height // 48)
        assert (fit.to_image(shown).x, fit.to_image(shown).y) == (x, y)
    for x, y in ((left - 1, top), (left + width, top), (left, top - 1), (left, top + height)):
        assert make_gesture(fit.to_image(Action(ActionKind.CLICK, x, y)), fit.image_size) is None


# The reward.


@pytest.mark.parametrize(("total", "reward"), [(-300.0, 0.0), (-200.0, 0.0), (-100.0, 0.5), (0.0, 1.0), (7.0, 1.0)])
def test_the_return_is_mapped_linearly_and_clipped(total: float, reward: float) -> None:
    options = EnvironmentOptions(min_return=-200, max_return=0)
    assert options.reward(total, has_ended=True) == reward
    assert options.reward(total, has_ended=False) == 0.0, "ending early must not avoid negative rewards"
    assert EnvironmentOptions(min_return=-200, max_return=0, requires_end=False).reward(total, False) == reward


def test_a_range_of_returns_must_not_be_empty() -> None:
    config = DesktopConfig(provider="gymnasium", provider_options={"id": "A-v0", "min_return": 1, "max_return": 1})
    with pytest.raises(UserError, match="min_return must be less than max_return"):
        select_provider(config)


# Images.


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 3), (48, 64, 4), (3, 48, 64), (1, 48, 64)])
def test_arrays_of_all_usual_shapes_are_images(shape: tuple[int, ...]) -> None:
    image = to_rgb(np.full(shape, 7, np.int64))
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8 and (image == 7).all()


@pytest.mark.parametrize(
    "array", [np.zeros(4), np.zeros((4, 4, 3)), np.full((4, 4), 256), np.full((4, 4), -1), np.array(None)]
)
def test_other_arrays_are_no_images(array: Any) -> None:
    with pytest.raises(ValueError, match="not an image"):
        to_rgb(array)


def png(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_an_image_of_an_observation_is_a_file_in_base64_or_an_array() -> None:
    expected = Image.new("RGB", (3, 2), (1, 2, 3))
    rows = [[[1, 2, 3]] * 3] * 2
    flat = [1, 2, 3] * 6
    for value in (png(expected), f"data:image/png;base64,{png(expected)}", rows):
        assert decode_observation_image({"screen": value}, "screen").tobytes() == expected.tobytes()
    observation = {"screen": flat, "shape": [2, 3, 3]}
    assert decode_observation_image(observation, "screen", "shape").tobytes() == expected.tobytes()
    assert decode_observation_image({"screen": [[9, 9], [9, 9]]}, "screen").getpixel((1, 1)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ({"other": 1}, "the observation has no 'screen', but other"),
        ({"screen": "no base64"}, "screen is not an image in base64"),
        ({"screen": base64.b64encode(b"text").decode()}, "neither complete nor of an allowed format"),
        ({"screen": 7}, "screen is neither an image in base64 nor an array"),
        ({"screen": [1, 2, 3]}, "screen is not an array of pixels"),
        ({"screen": [[256]]}, "screen is not an array of pixels"),
        ({"screen": [[[1, 2]]]}, r"the shape \(1, 1, 2\) is not that of an image"),
        ({"screen": [[1], [2, 3]]}, "screen is not an array of pixels"),
    ],
)
def test_an_observation_without_the_image_is_rejected(observation: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_observation_image(observation, "screen")


# Schemas of OpenEnv servers.

SCHEMA = {
    "action": {"properties": {"x": {}, "y": {}}, "required": ["x"], "additionalProperties": False},
    "observation": {"properties": {"screenshot": {}}, "additionalProperties": False},
}


@pytest.mark.parametrize(
    ("actions", "image_key", "problem"),
    [
        ({"click": {"x": "{x}"}}, "screenshot", None),
        ({"click": {"y": "{y}"}}, "screenshot", "actions: click: x is missing"),
        ({"click": {"x": 1, "z": 1}}, "screenshot", "actions: click: the action has no z, but x, y"),
        ({"click": 1}, "screenshot", "actions: click: x is missing"),
        ({"click": {"x": 1}}, "image", "image_key: the observation has no image, but screenshot"),
    ],
)
def test_options_that_contradict_the_schema_of_a_server_are_named(
    actions: dict[str, Any], image_key: str, problem: str | None
) -> None:
    assert schema_problem(SCHEMA, actions, image_key) == problem
    for unknown in ({}, None, {"action": 1}):
        assert schema_problem(unknown, actions, image_key) is None


# Tasks.


def test_environments_have_a_task_of_their_own_and_no_others() -> None:
    (play,) = load_tasks(ENVIRONMENT_SUITE)
    assert find_unmet(play) is None
    options = {"id": "Any-v0", "actions": {"press a": 0}}
    config = RunConfig.model_validate({"desktop": {"provider": "gymnasium", "provider_options": options}})
    assert [task.id for task in load(config)[0]] == ["play"]
    noisy = config.model_copy(update={"tasks": config.tasks.model_copy(update={"noise": "heavy"})})
    with pytest.raises(UserError, match="noise"):
        load(noisy)
    for task in load_tasks(ids=["make-a-folder", "fill-the-disc"]):
        assert find_unmet(task) is not None


def test_an_openenv_environment_needs_a_table_of_actions(tmp_path: Path) -> None:
    config = DesktopConfig(provider="openenv", provider_options={"address": "http://127.0.0.1:8000"})
    selected = select_provider(config)
    with pytest.raises(UserError, match=r"desktop\.provider_options\.actions is empty"):
        selected.provider.check_usable(config, selected.options)
