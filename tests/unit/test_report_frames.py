"""Actions as they are drawn on screenshots, and which episodes are worth showing."""

import base64
import io

import pytest
from PIL import Image

from deskrl.core.report.evidence import by_preference
from deskrl.core.report.frames import badge_of, data_uris, frame_of, mark_of, split_text
from deskrl.core.report.page import split_columns
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import replay_pb2


def test_a_coordinate_that_the_record_leaves_out_is_zero_and_one_beyond_the_screen_is_drawn_at_its_edge() -> None:
    mark = mark_of({"kind": "click", "y": 5000}, 1280, 720)
    assert mark is not None and (mark.x, mark.y) == (0, 720)


def test_a_drag_points_at_its_end() -> None:
    mark = mark_of({"kind": "drag", "x": 100, "y": 100, "end_x": 500, "end_y": 100}, 1280, 720)
    assert mark is not None and mark.arrow_head.startswith("500.0,100.0 ")
    assert 100 < mark.end_x < 500


def test_a_scroll_points_where_the_wheel_turned() -> None:
    mark = mark_of({"kind": "scroll", "x": 600, "y": 300, "scroll_y": -3}, 1280, 720)
    assert mark is not None and mark.end_y < mark.y and mark.end_x == mark.x


@pytest.mark.parametrize(
    ("action", "badge"),
    [
        ({"kind": "click"}, ""),
        ({"kind": "double_click"}, "double click"),
        ({"kind": "right_click"}, "right click"),
        ({"kind": "type", "text": "milk\n"}, "milk\n"),
        ({"kind": "hotkey", "keys": ["ctrl", "s"]}, "Ctrl + S"),
        ({"kind": "scroll", "scroll_y": 5}, "scroll down 5"),
        ({"kind": "scroll", "scroll_x": -2}, "scroll left 2"),
        ({"kind": "wait", "seconds": 1.0}, "wait 1 s"),
        ({"kind": "finished"}, "finished"),
        ({"kind": "infeasible"}, "declared infeasible"),
        ({}, "not an action"),
    ],
)
def test_badges(action: dict[str, object], badge: str) -> None:
    assert badge_of(action)[0] == badge


def test_thought_and_action_come_apart_at_the_last_action() -> None:
    assert split_text("Thought: say Action: x\nAction: wait()") == ("say Action: x", "wait()")
    assert split_text("gibberish") == ("", "gibberish")


def test_a_frame_is_numbered_from_one() -> None:
    frame = frame_of(Step(index=0, screenshot="a", images=("a",), text="Action: wait()", action={"kind": "wait"}), 9, 9)
    assert (frame.number, frame.action, frame.mark) == (1, "wait()", None)


def test_screenshots_are_scaled_and_what_is_no_picture_is_left_out() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1920, 1080), "navy").save(buffer, "PNG")
    uris = data_uris({"good": buffer.getvalue(), "torn": buffer.getvalue()[:60], "text": b"<svg/>"})
    assert list(uris) == ["good"]
    kind, data = uris["good"].split(",")
    assert kind == "data:image/png;base64", "a flat picture is smaller as PNG"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (640, 360)


def _episode(name: str, reward: float, at: float, num_steps: int = 3) -> replay_pb2.Episode:
    episode = replay_pb2.Episode(episode_id=name, finished_unix_s=at)
    episode.result.reward, episode.result.num_steps = reward, num_steps
    return episode


def test_an_early_failure_of_several_steps_and_the_latest_best_success_are_shown() -> None:
    episodes = [
        _episode("slip", 0, 1, num_steps=1),
        _episode("early", 0, 2),
        _episode("late failure", 0, 9),
        _episode("first success", 1, 3),
        _episode("last success", 1, 8),
        _episode("partial", 0.5, 10),
    ]
    failed, solved = by_preference(episodes, success_above=0.1)
    assert [it.episode_id for it in failed] == ["early", "late failure", "slip"]
    assert [it.episode_id for it in solved] == ["last success", "first success", "partial"]


def test_the_longer_episode_gets_more_of_the_width() -> None:
    frames = [(7, 4), (3, 3), (1, 3), (10, 0), (0, 6)]
    assert [split_columns(*pair) for pair in frames] == [3, 2, 1, 3, 1]
