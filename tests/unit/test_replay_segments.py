"""Segments: what is committed stays readable and is checked for, what is not leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskrl.core.errors import UserError
from deskrl.replay.segments import Segments

SEGMENT_BYTES = 100
MAX_BYTES = 32 * SEGMENT_BYTES


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "screenshots").iterdir()}


def test_bytes_are_read_where_they_were_appended_also_across_segments(tmp_path: Path) -> None:
    segments = Segments(tmp_path, {}, MAX_BYTES)
    shots = [bytes([number]) * 60 for number in range(5)]
    places = [segments.append(shot) for shot in shots]
    segments.sync()
    segments.commit()
    assert [segments.read(place, 60) for place in places] == shots
    assert [(place.segment, place.position) for place in places] == [(1, 0), (1, 60), (2, 0), (2, 60), (3, 0)]
    segments.close()


def test_what_was_rolled_back_is_written_over(tmp_path: Path) -> None:
    segments = Segments(tmp_path, {}, MAX_BYTES)
    kept = segments.append(b"kept")
    segments.commit()
    segments.append(b"rolled back")
    segments.roll_back()
    assert files(tmp_path) == {"00000001.bin": 4}
    place = segments.append(b"next")
    assert (segments.read(kept, 4), segments.read(place, 4)) == (b"kept", b"next")
    segments.close()


def test_after_a_restart_what_no_row_names_is_gone_and_old_segments_are_left_alone(tmp_path: Path) -> None:
    first = Segments(tmp_path, {}, MAX_BYTES)
    named = first.append(b"named by a row")
    first.append(bytes(200))
    first.append(b"in a segment that no row names")
    first.close()
    second = Segments(tmp_path, {1: 14}, MAX_BYTES)
    assert list(files(tmp_path)) == ["00000001.bin"]
    assert second.append(b"new").segment == 2
    assert second.read(named, 14) == b"named by a row"
    second.close()


@pytest.mark.parametrize(("num_bytes", "told"), [(None, "is missing"), (13, "was cut short at 13 of 14 bytes")])
def test_a_damaged_segment_is_refused_before_anything_is_removed(
    tmp_path: Path, num_bytes: int | None, told: str
) -> None:
    segments = Segments(tmp_path, {}, MAX_BYTES)
    segments.append(bytes(14))
    segments.close()
    path = tmp_path / "screenshots" / "00000001.bin"
    other = path.with_name("00000009.bin")
    other.write_bytes(b"")
    if num_bytes is None:
        path.unlink()
    else:
        path.write_bytes(bytes(num_bytes))
    with pytest.raises(UserError, match=told):
        Segments(tmp_path, {1: 14}, MAX_BYTES)
    assert other.exists()


def test_a_removed_segment_is_said_to_be_gone(tmp_path: Path) -> None:
    segments = Segments(tmp_path, {}, MAX_BYTES)
    place = segments.append(bytes(SEGMENT_BYTES))
    segments.append(bytes(1))
    segments.commit()
    segments.remove([place.segment])
    with pytest.raises(FileNotFoundError):
        segments.read(place, 1)
    segments.close()
