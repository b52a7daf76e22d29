"""Blob log: committed bytes stay readable and are checked at start; uncommitted bytes are removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskrl.core.errors import UserError
from deskrl.replay.blob_log import BlobLog

SEGMENT_BYTES = 100
MAX_BYTES = 32 * SEGMENT_BYTES


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "screenshots").iterdir()}


def test_bytes_are_read_from_the_location_at_which_they_were_appended_in_every_segment(tmp_path: Path) -> None:
    blob_log = BlobLog(tmp_path, {}, MAX_BYTES)
    shots = [bytes([number]) * 60 for number in range(5)]
    locations = [blob_log.append(shot) for shot in shots]
    blob_log.sync()
    blob_log.commit()
    assert [blob_log.read(location, 60) for location in locations] == shots
    assert [(it.segment, it.position) for it in locations] == [
        (1, 0),
        (1, 60),
        (2, 0),
        (2, 60),
        (3, 0),
    ]
    blob_log.close()


def test_bytes_that_were_rolled_back_are_overwritten(tmp_path: Path) -> None:
    blob_log = BlobLog(tmp_path, {}, MAX_BYTES)
    kept = blob_log.append(b"kept")
    blob_log.commit()
    blob_log.append(b"rolled back")
    blob_log.roll_back()
    assert files(tmp_path) == {"00000001.bin": 4}
    location = blob_log.append(b"next")
    assert (blob_log.read(kept, 4), blob_log.read(location, 4)) == (b"kept", b"next")
    blob_log.close()


def test_a_restart_removes_segments_that_no_row_names_and_keeps_the_others(tmp_path: Path) -> None:
    first = BlobLog(tmp_path, {}, MAX_BYTES)
    named = first.append(b"named by a row")
    first.append(bytes(200))
    first.append(b"in a segment that no row names")
    first.close()
    second = BlobLog(tmp_path, {1: 14}, MAX_BYTES)
    assert list(files(tmp_path)) == ["00000001.bin"]
    assert second.append(b"new").segment == 2
    assert second.read(named, 14) == b"named by a row"
    second.close()


@pytest.mark.parametrize(("num_bytes", "message"), [(None, "not found"), (13, "truncated at 13 of 14 bytes")])
def test_a_damaged_segment_is_rejected_before_any_file_is_removed(
    tmp_path: Path, num_bytes: int | None, message: str
) -> None:
    blob_log = BlobLog(tmp_path, {}, MAX_BYTES)
    blob_log.append(bytes(14))
    blob_log.close()
    path = tmp_path / "screenshots" / "00000001.bin"
    other = path.with_name("00000009.bin")
    other.write_bytes(b"")
    if num_bytes is None:
        path.unlink()
    else:
        path.write_bytes(bytes(num_bytes))
    with pytest.raises(UserError, match=message):
        BlobLog(tmp_path, {1: 14}, MAX_BYTES)
    assert other.exists()


def test_reading_a_removed_segment_raises_file_not_found(tmp_path: Path) -> None:
    blob_log = BlobLog(tmp_path, {}, MAX_BYTES)
    location = blob_log.append(bytes(SEGMENT_BYTES))
    blob_log.append(bytes(1))
    blob_log.commit()
    blob_log.remove([location.segment])
    with pytest.raises(FileNotFoundError):
        blob_log.read(location, 1)
    blob_log.close()
