"""Schema of exported datasets: one row for each step, with the metadata by which Hugging Face `datasets` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deskrl.core.errors import UserError

FORMAT_VERSION = 1
"""Version of the columns; a reader rejects others."""
_VERSION_KEY = b"deskrl_format_version"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Storage type of the feature `Image`."""
_SPAN = pa.struct([("lineage", pa.string()), ("step", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "episode_id": (pa.string(), "id of the episode; its rows follow one another in the order of `step`"),
    "group_id": (pa.string(), "id of the group of episodes whose rewards are compared"),
    "member": (pa.int32(), "index of the episode in its group"),
    "task_id": (pa.string(), "id of the task"),
    "queue": (pa.string(), "queue of the replay service: `train`, `demo`, `eval/before` or `eval/after`"),
    "split": (pa.string(), "first part of `queue`"),
    "seed": (pa.uint64(), "seed of the episode"),
    "instruction": (pa.string(), "instruction of the task"),
    "step": (pa.int32(), "index of the step in the episode, from 0"),
    "num_steps": (pa.int32(), "number of steps of the episode"),
    "screenshot": (_IMAGE, "screenshot before the action, as the policy sees it; its path is its SHA-256 hash"),
    "screen_width": (pa.int32(), "width of the screen in pixels, to which the points of `action` refer"),
    "screen_height": (pa.int32(), "height of the screen in pixels"),
    "text": (pa.string(), "output of the policy: thought and action"),
    "action": (pa.string(), "action in screen pixels (JSON); empty if the output could not be parsed"),
    "reward": (pa.float32(), "reward of the episode"),
    "advantage": (pa.float64(), "advantage of the episode in its group; null if the run does not store it any more"),
    "termination": (pa.string(), "why the episode ended"),
    "acting_policy": (pa.string(), "`sampled`, or `scripted` for a scripted solution"),
    "temperature": (pa.float32(), "sampling temperature"),
    "prompt_ids": (pa.list_(pa.int32()), "token ids of the prompt; empty for scripted steps"),
    "action_ids": (pa.list_(pa.int32()), "token ids of the output"),
    "logprobs": (pa.list_(pa.float32()), "logprobs of `action_ids` under the behaviour policy"),
    "policy_versions": (pa.list_(_SPAN), "policy versions that sampled the tokens [start, end) of `action_ids`"),
    "processor_hash": (pa.string(), "hash of the tokenizer and the image processor"),
    "ended_unix_s": (pa.float64(), "time at which the episode ended, in seconds since 1970"),
}
"""Columns in their order: storage type and description."""


def feature_of(name: str, kind: pa.DataType) -> Any:
    """Return the feature of a column in the JSON form of `datasets`."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: feature_of(field.name, field.type) for field in kind}
    if pa.types.is_list(kind):
        inner = feature_of(name, kind.value_type)
        # `Sequence` of structs would be read as a struct of lists.
        return [inner] if pa.types.is_struct(kind.value_type) else {"feature": inner, "_type": "Sequence"}
    return {"dtype": {pa.float32(): "float32", pa.float64(): "float64"}.get(kind, str(kind)), "_type": "Value"}


def dataset_schema() -> pa.Schema:
    """Return the schema with the features and the format version in its metadata."""
    features = {name: feature_of(name, kind) for name, (kind, _) in COLUMNS.items()}
    return pa.schema(
        [pa.field(name, kind) for name, (kind, _) in COLUMNS.items()],
        metadata={
            b"huggingface": json.dumps({"info": {"features": features}}).encode(),
            _VERSION_KEY: str(FORMAT_VERSION).encode(),
        },
    )


def open_dataset_file(path: Path) -> pq.ParquetFile:
    """Open a file of an exported dataset.

    Raises:
        UserError: it is not a Parquet file, has no format version of deskrl or another one, or lacks columns.
    """
    hint = "give a dataset that deskrl data export has written"
    try:
        file = pq.ParquetFile(path, pre_buffer=False)  # else it holds whole row groups in memory
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())[:200]}", hint) from error
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise UserError(f"{path}: has no format version of deskrl", hint)
    if version != str(FORMAT_VERSION).encode():
        written = version.decode(errors="replace")[:20]
        raise UserError(f"{path}: format version {written}, but this deskrl reads {FORMAT_VERSION}", "update deskrl")
    wrong = [name for name, (kind, _) in COLUMNS.items() if _type_of(schema, name) != kind]
    if wrong:
        raise UserError(f"{path}: columns are missing or have another type: {', '.join(wrong)}", hint)
    return file


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    index = schema.get_field_index(name)
    return None if index < 0 else schema.field(index).type
