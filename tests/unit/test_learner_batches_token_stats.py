"""Files of token statistics: round trip, retention and damaged files."""

from pathlib import Path

import pytest

from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import CodecError
from deskrl.learner.batches.token_stats import EpisodeTokenStats, read_token_stats, write_token_stats

STATS = {"train/0": {"train/0.1": EpisodeTokenStats(-0.25, True, (-0.5, -1.5), (0.25, 2.0))}}


def test_token_stats_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_token_stats(RunDir(tmp_path), "train/000001", STATS, keep=1)
    assert read_token_stats(RunDir(tmp_path), "train/000001") == STATS
    assert read_token_stats(RunDir(tmp_path), "train/000002") == {}


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    for number in (9, 10, 11):
        write_token_stats(folder, f"train/{number:06d}", STATS, keep=2)
    assert [bool(read_token_stats(folder, f"train/{number:06d}")) for number in (9, 10, 11)] == [False, True, True]


def test_keeping_none_writes_no_file(tmp_path: Path) -> None:
    write_token_stats(RunDir(tmp_path), "train/000001", STATS, keep=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_damaged_file_raises_codec_error(tmp_path: Path, cut: int) -> None:
    folder = RunDir(tmp_path)
    write_token_stats(folder, "train/000001", STATS, keep=1)
    (path,) = folder.token_stats.iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CodecError):
        read_token_stats(folder, "train/000001")
