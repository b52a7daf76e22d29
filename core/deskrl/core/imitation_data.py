"""Demonstrations as the policy reads and writes them, in the run directory: the actor renders them, the learner reads.

demonstrations/000000.msgpack    one demonstration: task id, and steps as `step_codec` encodes them
demonstrations/images/HASH.png   a screenshot as the policy sees it
demonstrations/complete.json     source and counts; written at the end
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object, write_json
from deskrl.core.step_codec import CodecError, Step, decode_step, encode_step

_SCHEMA = 1
_HINT = "remove the folder and start the run again, which renders the demonstrations anew"


@dataclass(frozen=True)
class RenderedDemonstration:
    """One demonstration with the conversations of its steps."""

    task_id: str
    steps: tuple[Step, ...]


class ImitationDataWriter:
    """Writes the demonstrations of a run; a folder without complete.json is written anew.

    Args:
        folder: `RunDir.demonstrations`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        self._num_written = 0

    def add(self, demonstration: RenderedDemonstration, images: Mapping[str, bytes]) -> None:
        """Write a demonstration and its screenshots (PNG files by hash)."""
        for name, data in images.items():
            path = _image_path(self._folder, name)
            if not path.exists():
                path.write_bytes(data)
        steps = [encode_step(step) for step in demonstration.steps]
        record = {"schema": _SCHEMA, "task_id": demonstration.task_id, "steps": steps}
        (self._folder / f"{self._num_written:06d}.msgpack").write_bytes(msgpack.packb(record))
        self._num_written += 1

    def complete(self, **facts: Any) -> None:
        """Write complete.json with the number of demonstrations and these facts."""
        write_json(self._folder / "complete.json", {"num_demonstrations": self._num_written, **facts})


class ImitationData:
    """Reads the demonstrations of a run.

    Args:
        folder: `RunDir.demonstrations`.

    Raises:
        UserError: the folder is missing or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.facts = read_json_object(folder / "complete.json", _HINT)
        """Content of complete.json."""
        self._paths = sorted(folder.glob("*.msgpack"))
        if len(self._paths) != self.facts.get("num_demonstrations"):
            raise UserError(f"{folder}: demonstrations are missing", _HINT)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> RenderedDemonstration:
        """Return a demonstration.

        Raises:
            UserError: the file is damaged.
        """
        path = self._paths[index]
        try:
            record = msgpack.unpackb(path.read_bytes(), strict_map_key=True, max_ext_len=0)
            if record["schema"] != _SCHEMA:
                raise CodecError("unsupported schema version")
            return RenderedDemonstration(record["task_id"], tuple(map(decode_step, record["steps"])))
        except (CodecError, KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
            raise UserError(f"{path}: damaged: {error}", _HINT) from error

    def read_images(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return those screenshots that belong to demonstrations, by hash."""
        return read_images(self._folder, hashes)


def read_images(folder: Path, hashes: Iterable[str]) -> dict[str, bytes]:
    """Return those screenshots that belong to the demonstrations in a folder, by hash; none if it does not exist."""
    paths = {name: _image_path(folder, name) for name in hashes}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def is_complete(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether a folder was completed with these facts."""
    try:
        found = read_json_object(folder / "complete.json", _HINT)
    except UserError:
        return False
    return all(found.get(name) == value for name, value in facts.items())


def _image_path(folder: Path, name: str) -> Path:
    return folder / "images" / f"{name}.png"
