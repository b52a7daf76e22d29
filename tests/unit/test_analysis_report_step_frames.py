"""Frames of a report: actions drawn on screenshots, and the choice of example episodes."""

import base64
import io

import pytest
from PIL import Image

from deskrl.analysis.report.replay_data import rank_examples
from deskrl.analysis.report.report_view_models import split_columns
from deskrl.analysis.report.step_frames import (
    action_badge,
    action_mark,
    encode_data_uris,
    make_frame,
    split_thought_and_action,
)
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.stored_episodes import EpisodeRecord


def test_a_missing_coordinate_is_zero_and_one_beyond_the_screen_is_clipped_to_its_edge() -> None:
    mark = action_mark({"kind": "click", "y": 5000}, 1280, 720)
    assert mark is not None and (mark.x, mark.y) == (0, 720)


def test_the_arrow_of_a_drag_points_at_its_end() -> None:
    mark = action_mark({"kind": "drag", "x": 100, "y": 100, "end_x": 500, "end_y": 100}, 1280, 720)
    assert mark is not None and mark.arrow_head.startswith("500.0,100.0 ")
    assert 100 < mark.end_x < 500


def test_the_arrow_of_a_scroll_points_in_its_direction() -> None:
    mark = action_mark({"kind": "scroll", "x": 600, "y": 300, "scroll_y": -3}, 1280, 720)
    assert mark is not None and mark.end_y < mark.y and mark.end_x == mark.x


@pytest.mark.parametrize(
    ("action", "badge"),
    [
        ({"kind": "click"}, ""),
        ({"kind": "double_click"}, "double click"),
        ({"kind": "middle_click"}, "middle click"),
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
def test_each_kind_of_action_has_its_caption(action: dict[str, object], badge: str) -> None:
    assert action_badge(action)[0] == badge


def test_text_is_split_into_thought_and_action_at_the_last_action_marker() -> None:
    assert split_thought_and_action("Thought: say Action: x\nAction: wait()") == ("say Action: x", "wait()")
    assert split_thought_and_action("gibberish") == ("", "gibberish")
    call = '{"type": "tool_use", "name": "computer", "input": {"action": "type", "text": "Action: x"}}'
    assert split_thought_and_action(f"I type.\n{call}") == ("I type.", call)
    call = '<tool_call>\n{"name": "computer_use", "arguments": {"action": "wait"}}\n</tool_call>'
    assert split_thought_and_action(f"I wait.\n{call}")[0] == "I wait."


def test_frames_are_numbered_from_one() -> None:
    frame = make_frame(
        Step(index=0, screenshot="a", images=("a",), text="Action: wait()", action={"kind": "wait"}), 9, 9
    )
    assert (frame.number, frame.action, frame.mark) == (1, "wait()", None)


def test_screenshots_are_scaled_and_data_that_is_not_an_image_is_omitted() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1920, 1080), "navy").save(buffer, "PNG")
    uris = encode_data_uris({"good": buffer.getvalue(), "torn": buffer.getvalue()[:60], "text": b"<svg/>"})
    assert list(uris) == ["good"]
    kind, data = uris["good"].split(",")
    assert kind == "data:image/png;base64", "a flat picture is smaller as PNG"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (640, 360)


def _episode(name: str, reward: float, ended_unix_s: float, num_steps: int = 3) -> EpisodeRecord:
    return EpisodeRecord(
        rollout=1,
        episode_id=name,
        group_id="eval/0",
        queue="eval",
        task_id="note",
        member=0,
        seed=0,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        state="finished",
        reward=reward,
        termination=rollout_pb2.TERMINATION_FINISHED,
        fault_kind=None,
        num_faults=0,
        num_steps=num_steps,
        lineage="main",
        oldest_version=0,
        newest_version=0,
        ending=1,
        ended_unix_s=ended_unix_s,
        removed=False,
        damage="",
        result=rollout_pb2.EpisodeResult(reward=reward, num_steps=num_steps),
        last_fault=None,
    )


def test_an_early_failure_of_several_steps_and_the_latest_best_success_rank_first() -> None:
    episodes = [
        _episode("slip", 0, 1, num_steps=1),
        _episode("early", 0, 2),
        _episode("late failure", 0, 9),
        _episode("first success", 1, 3),
        _episode("last success", 1, 8),
        _episode("partial", 0.5, 10),
    ]
    failed, solved = rank_examples(episodes, success_threshold=0.1)
    assert [it.episode_id for it in failed] == ["early", "late failure", "slip"]
    assert [it.episode_id for it in solved] == ["last success", "first success", "partial"]


def test_the_longer_episode_gets_more_columns() -> None:
    frames = [(7, 4), (3, 3), (1, 3), (10, 0), (0, 6)]
    assert [split_columns(*pair) for pair in frames] == [3, 2, 1, 3, 1]
