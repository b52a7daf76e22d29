"""Parquet files of exported episodes: shards and metadata, and the import of good, damaged and foreign files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstrations import find_demonstrations, read_demonstration, read_screenshot
from deskrl.analysis.datasets.import_data import Source, import_episodes
from deskrl.analysis.datasets.parquet_schema import COLUMNS
from deskrl.analysis.datasets.shard_writer import MAX_GROUP_ROWS, ShardWriter
from deskrl.cli.main import main
from deskrl.core.errors import UserError
from deskrl.core.left_out import LeftOut

SIZE = (64, 36)
FINISHED = '{"kind": "finished"}'


def picture(colour: str = "navy") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, colour).save(buffer, "PNG")
    return buffer.getvalue()


def row(**values: Any) -> dict[str, Any]:
    """Return a row of a usual episode of one step; the columns that an import does not read are null."""
    return {
        "episode_id": "train/0.0",
        "task_id": "note",
        "seed": 2**64 - 1,
        "instruction": "Save the note.",
        "step": 0,
        "num_steps": 1,
        "screenshot": {"bytes": picture(), "path": "x.png"},
        "screen_width": SIZE[0],
        "screen_height": SIZE[1],
        "text": "Thought: I click.\nAction: click(31,17)",
        "action": '{"kind": "click", "x": 31, "y": 17}',
        "reward": 1.0,
        "termination": "step_limit",
    } | values


def written(folder: Path, *episodes: list[dict[str, Any]], max_shard_bytes: int = 10**9) -> list[Path]:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "train", max_shard_bytes)
    for rows in episodes:
        writer.add(rows)
    return writer.close()


def two_steps(**first: Any) -> list[dict[str, Any]]:
    """Return an episode of two steps, in which only the first may be damaged."""
    last = row(step=1, num_steps=2, action=FINISHED, text="Thought: Done.\nAction: finished()")
    return [row(num_steps=2) | first, last]


def test_files_end_between_episodes_once_they_are_large_enough(tmp_path: Path) -> None:
    paths = written(tmp_path / "data", *[two_steps()] * 3, max_shard_bytes=1)
    assert [path.name for path in paths] == [f"train-0000{number}-of-00003.parquet" for number in range(3)]
    assert sorted((tmp_path / "data").iterdir()) == paths
    assert [pq.read_table(path)["step"].to_pylist() for path in paths] == [[0, 1]] * 3


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-00000.partial").mkdir()
    writer = ShardWriter(tmp_path, "train")
    writer.add([row()])
    with pytest.raises(UserError, match=r"train-\*.parquet: cannot be written: Is a directory"):
        writer.close()


def test_row_groups_have_a_bounded_number_of_rows(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "data", *[two_steps()] * MAX_GROUP_ROWS)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [MAX_GROUP_ROWS] * 2


def test_the_metadata_declares_the_features_of_hugging_face(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "data", two_steps())
    features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert list(features) == list(COLUMNS)
    assert features["screenshot"] == {"_type": "Image"}
    assert features["seed"] == {"dtype": "uint64", "_type": "Value"}
    assert features["reward"] == {"dtype": "float32", "_type": "Value"}
    assert features["logprobs"] == {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    assert [*features["policy_versions"][0]] == ["lineage", "step", "start", "end"]


def test_rows_become_demonstrations(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "data", two_steps(), [row(episode_id="train/1.0", reward=0.0)])
    left_out = LeftOut()
    assert import_episodes(Source(path), tmp_path / "out", left_out) == (2, 3)
    first, second = find_demonstrations(tmp_path / "out")
    found = read_demonstration(first)
    assert [step.action for step in found.steps] == [Action(ActionKind.CLICK, x=31, y=17), Action(ActionKind.FINISHED)]
    assert [step.thought for step in found.steps] == ["I click.", "Done."]
    assert read_screenshot(first, found, found.steps[0].screenshot) == picture()
    assert (found.task_id, found.instruction, found.seed) == ("note", "Save the note.", 2**64 - 1)
    assert (found.screen_size, found.termination, found.reward) == (SIZE, "finished", 1.0)
    assert (read_demonstration(second).termination, read_demonstration(second).reward) == ("step_limit", 0.0)
    assert left_out.count("step") == 0


def test_points_are_scaled_to_screenshots_that_were_resized_for_the_policy(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "data", [row(screen_width=128, screen_height=72)])
    import_episodes(Source(path), tmp_path / "out", LeftOut())
    (folder,) = find_demonstrations(tmp_path / "out")
    assert read_demonstration(folder).steps[0].action == Action(ActionKind.CLICK, x=16, y=8)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"action": '{"kind": "fly"}'}, "its action is none that deskrl has"),
        ({"action": "[["}, "its action is none that deskrl has"),
        ({"action": '{"kind": "hotkey", "keys": ["hyperspace"]}'}, "its action is none that deskrl has"),
        ({"action": '{"kind": "click", "x": 64, "y": 1}'}, "its point is outside the screenshot"),
        ({"action": ""}, "its output could not be parsed as an action"),
        ({"action": None}, "its output could not be parsed as an action"),
        ({"screenshot": {"bytes": b"", "path": None}}, "its row has no screenshot"),
        ({"screenshot": {"bytes": b"GIF89a", "path": ""}}, "its screenshot cannot be decoded"),
        ({"screen_width": None}, "its row has no screen size"),
    ],
)
def test_a_damaged_row_is_left_out_and_counted(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    (path,) = written(tmp_path / "data", two_steps(**columns))
    left_out = LeftOut()
    assert import_episodes(Source(path), tmp_path / "out", left_out) == (1, 1)
    assert left_out.reasons("step") == {reason: 1}
    assert left_out.examples("step", reason)[0].startswith(f"{path.name} train/0.0 step 0")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"num_steps": 3}, "some of its rows are missing"),
        ({"reward": -1.0}, "its reward is not between 0 and 1"),
        ({"action": "", "step": None}, "none of its steps could be read"),
        ({"task_id": None}, "its row lacks a value"),
    ],
)
def test_an_unusable_episode_is_left_out_and_counted(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    (path,) = written(tmp_path / "data", [row(**columns)], [row(episode_id="train/1.0")])
    left_out = LeftOut()
    assert import_episodes(Source(path), tmp_path / "out", left_out) == (1, 1)
    assert left_out.reasons("episode") == {reason: 1}


def test_another_format_version_is_rejected_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = written(tmp_path / "data", two_steps())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"deskrl_format_version": b"2"}), path)
    assert main(["data", "import", str(path), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "format version 2, but this deskrl reads 1" in captured.err
    assert [one.name for one in tmp_path.iterdir()] == ["data"]


def test_files_that_are_no_exported_dataset_are_rejected(tmp_path: Path) -> None:
    (exported,) = written(tmp_path / "data", two_steps())
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        import_episodes(Source(path), tmp_path / "out", LeftOut())
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="no format version"):
        import_episodes(Source(path), tmp_path / "out", LeftOut())
    pq.write_table(pq.read_table(exported).drop_columns(["text"]), path)
    with pytest.raises(UserError, match="columns are missing or have another type: text"):
        import_episodes(Source(path), tmp_path / "out", LeftOut())


def test_a_file_with_damaged_names_is_rejected(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "in", [row()])
    data = path.read_bytes()
    assert data.count(b"processor_hash") > 1
    path.write_bytes(data.replace(b"processor_hash", b"processor_has\xff"))
    with pytest.raises(UserError, match=f"{path}: "):
        import_episodes(Source(path), tmp_path / "out", LeftOut())


def test_a_file_that_is_damaged_after_its_beginning_is_rejected(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "data", two_steps())
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        import_episodes(Source(path), tmp_path / "out", LeftOut())
    assert not (tmp_path / "out").exists()
