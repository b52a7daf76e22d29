"""An exported dataset as Hugging Face `datasets` reads it, in a process of its own without network."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.analysis.datasets.dataset_card import dataset_card
from deskrl.analysis.datasets.parquet_schema import COLUMNS
from deskrl.analysis.datasets.shard_writer import ShardWriter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed (pip install datasets)"
)
READ = """
import json, sys
from datasets import Image, load_dataset

loaded = load_dataset(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))
rows = loaded["train"]
assert isinstance(rows.features["screenshot"], Image), rows.features
first = rows[0]
print(json.dumps({
    "splits": {name: part.num_rows for name, part in loaded.items()},
    "columns": rows.column_names,
    "size": first["screenshot"].size,
    "pixel": first["screenshot"].getpixel((0, 0)),
    "logprobs": first["logprobs"],
    "policy_versions": first["policy_versions"],
    "seed": first["seed"],
    "advantage": first["advantage"],
}))
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with 120 steps of training in several files, and 1 of evaluation."""
    out = tmp_path / "dataset"
    (out / "data").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 36), (10, 20, 30)).save(buffer, "PNG")
    row: dict[str, Any] = {
        "episode_id": "train/0.0",
        "seed": 2**64 - 1,
        "screenshot": {"bytes": buffer.getvalue(), "path": "x.png"},
        "logprobs": [-0.5, -2.25],
        "policy_versions": [{"lineage": "main", "step": 6, "start": 0, "end": 2}],
    }
    splits = {}
    for split, num_episodes in (("train", 60), ("eval", 1)):
        writer = ShardWriter(out / "data", split, max_shard_bytes=4000)
        for _ in range(num_episodes):
            writer.add([row] * (2 if split == "train" else 1))
        writer.close()
        splits[split] = (num_episodes, writer.num_rows)
    (out / "README.md").write_text(dataset_card("demo", "0.1.0", splits))
    return out


def load(tmp_path: Path, *arguments: str, **options: Any) -> dict[str, Any]:
    """Load a dataset in another process, and return what it prints of it."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, json.dumps(arguments), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any]) -> None:
    assert found["columns"] == list(COLUMNS)
    assert (found["size"], found["pixel"]) == ([64, 36], [10, 20, 30])
    assert found["logprobs"] == [-0.5, -2.25]
    assert found["policy_versions"] == [{"lineage": "main", "step": 6, "start": 0, "end": 2}]
    assert (found["seed"], found["advantage"]) == (2**64 - 1, None)


def test_the_folder_is_loaded_with_its_splits(dataset: Path, tmp_path: Path) -> None:
    assert len(list((dataset / "data").glob("train-*"))) > 1
    found = load(tmp_path, str(dataset))
    assert found["splits"] == {"train": 120, "eval": 1}
    check(found)


def test_the_files_are_loaded_with_images_and_without_declaring_features(dataset: Path, tmp_path: Path) -> None:
    found = load(tmp_path, "parquet", data_files=str(dataset / "data" / "train-*.parquet"))
    assert found["splits"] == {"train": 120}
    check(found)
