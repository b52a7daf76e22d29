"""Changed rows of a frame: the client's frame is the guest's after each reply, and other replies are rejected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.actor.guest.frame_changes import (
    FrameSender,
    Rows,
    changed_rows,
    format_rows,
    parse_rows,
    replace_rows,
)

ROW_BYTES = 4


def frame(*rows: int) -> bytes:
    """Return a frame whose rows have one value each."""
    return b"".join(bytes([row]) * ROW_BYTES for row in rows)


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        (frame(1, 2, 3), frame(1, 2, 3), []),
        (frame(1, 2, 3), frame(1, 9, 3), [(1, 2)]),
        (frame(1, 2, 3, 4), frame(9, 2, 8, 7), [(0, 1), (2, 4)]),
        (frame(1, 2), frame(3, 4), [(0, 2)]),
        (frame(1, 1), frame(1, 1)[:-1] + b"\0", [(1, 2)]),
    ],
)
def test_the_changed_rows_are_those_that_differ(before: bytes, after: bytes, rows: Rows) -> None:
    assert changed_rows(before, after, ROW_BYTES) == rows


def test_many_ranges_are_merged_into_the_last_one() -> None:
    before, after = frame(*[0] * 400), frame(*[0, 1] * 200)
    rows = changed_rows(before, after, ROW_BYTES)
    assert len(rows) == 64 and rows[:2] == [(1, 2), (3, 4)] and rows[-1] == (127, 400)


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=8), st.data())
def test_the_client_has_the_frames_of_the_guest(frames: list[list[int]], data: st.DataObject) -> None:
    sender = FrameSender(ROW_BYTES)
    known, pixels = "", bytearray()
    for rows in frames:
        reply = sender.reply(frame(*rows), known)
        if reply.rows is None:
            pixels = bytearray(reply.data)
        else:
            replace_rows(pixels, parse_rows(format_rows(reply.rows)), reply.data, ROW_BYTES)
        assert pixels == frame(*rows)
        known = reply.frame_id
        if data.draw(st.booleans()):
            sender.reply(frame(*rows[::-1]), "")  # another client, after which the next reply is a whole frame


def test_a_frame_of_another_guest_process_is_not_a_base() -> None:
    first = FrameSender(ROW_BYTES).reply(frame(1), "")
    assert FrameSender(ROW_BYTES).reply(frame(1), first.frame_id).rows is None


@pytest.mark.parametrize(
    ("rows", "data"),
    [
        ([(0, 4)], frame(1, 1, 1, 1)),
        ([(2, 1)], b""),
        ([(1, 2), (0, 1)], frame(1, 1)),
        ([(0, 2)], frame(1)),
        ([], frame(1)),
    ],
)
def test_rows_outside_the_frame_and_data_of_another_size_are_rejected(rows: Rows, data: bytes) -> None:
    pixels = bytearray(frame(1, 2, 3))
    with pytest.raises(ValueError, match="rows"):
        replace_rows(pixels, rows, data, ROW_BYTES)
    assert pixels == frame(1, 2, 3)


@pytest.mark.parametrize("text", ["a-b", "1", "1-2-3", "-1-2", "1-2,", "\xb2-3", "1-2;3-4", "0-1," * 400])
def test_other_text_than_ranges_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="ranges of rows"):
        parse_rows(text)
