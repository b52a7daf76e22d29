"""Scores on disk: what was written is read, the newest are kept, and damage is told."""

from pathlib import Path

import pytest

from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import EpisodeScores, read_scores, write_scores
from deskrl.core.trajectory import CodecError

SCORES = {"train/0": {"train/0.1": EpisodeScores(-0.25, True, (-0.5, -1.5), (0.25, 2.0))}}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_scores(RunFolder(tmp_path), "train/000001", SCORES, keep=1)
    assert read_scores(RunFolder(tmp_path), "train/000001") == SCORES
    assert read_scores(RunFolder(tmp_path), "train/000002") == {}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (9, 10, 11):
        write_scores(folder, f"train/{number:06d}", SCORES, keep=2)
    assert [bool(read_scores(folder, f"train/{number:06d}")) for number in (9, 10, 11)] == [False, True, True]


def test_none_are_kept_where_none_are_wanted(tmp_path: Path) -> None:
    write_scores(RunFolder(tmp_path), "train/000001", SCORES, keep=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_damaged_file_is_told(tmp_path: Path, cut: int) -> None:
    folder = RunFolder(tmp_path)
    write_scores(folder, "train/000001", SCORES, keep=1)
    (path,) = folder.scores.iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CodecError):
        read_scores(folder, "train/000001")
