"""Checkpoints: a model folder that transformers and vLLM load, beside what it takes to go on.

    checkpoints/epoch_N/              after N passes over the task list (epoch_N_update_U between two of them)
        model.safetensors, config.json, tokenizer and processor files
        engine/                       optimizer and master weights, as DeepSpeed writes them
        learner.json                  the learner's counters, written last, with the size of every file
    checkpoints/latest                link to the newest
    checkpoints/lineages.json         every lineage of the run (see lineage.py)

A checkpoint appears whole or not at all (see checkpoint_writer.py). There are no random states to keep: everything
random follows from the run's seed and the counters. Knows files; knows nothing of what the counters mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.learner.lineage import VersionTree

if TYPE_CHECKING:
    from deskrl.learner.policy.engine import Engine

SCHEMA = 1
RECORD = "learner.json"
"""What a learner keeps of itself beside the model and the engine's state."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    num_updates: int
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run.
        model_folder: where the initial model lies; its configuration and processor go into every checkpoint.
        layout: what a checkpoint depends on besides the model: ranks, ZeRO stage, numeric type.
    """

    def __init__(self, folder: Path, model_folder: Path, layout: Mapping[str, Any]) -> None:
        self.folder = folder
        self.model_folder = model_folder
        self.layout = {**layout, "model": _fingerprint(model_folder)}
        self._lineages = folder / "lineages.json"

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None in a fresh run.

        Raises:
            UserError: it cannot be read, or belongs to another model or another layout of ranks.
        """
        found = self.found()
        if not found:
            return None
        self.check_whole(found[-1])
        return found[-1]

    def found(self) -> list[Checkpoint]:
        """All checkpoints, oldest first; raises UserError if one is none of a learner."""
        paths = [path for path in self.folder.glob("epoch_*") if path.is_dir()]
        return sorted(map(self._read, paths), key=lambda checkpoint: checkpoint.num_updates)

    def load(self, checkpoint: Checkpoint, engine: Engine) -> None:
        """Restore weights and optimizer; a collective call.

        Raises:
            UserError: DeepSpeed cannot read its part.
        """
        try:
            engine.load(checkpoint.path / "engine")
        except Exception as error:  # unpickling and DeepSpeed fail in many ways; all mean one thing here
            raise self._refusal(checkpoint.path, f"its engine state cannot be read ({_one_line(error)})") from error

    def read_lineages(self) -> VersionTree:
        """All lineages that the run has had."""
        if not self._lineages.exists():
            return VersionTree(())
        try:
            return VersionTree.from_json(json.loads(self._lineages.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._refusal(self._lineages, f"it cannot be read ({_one_line(error)})") from error

    def write_lineages(self, tree: VersionTree) -> None:
        """Keep them, before anything acts under the newest."""
        write_json(self._lineages, tree.to_json())

    def _read(self, path: Path) -> Checkpoint:
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise self._refusal(path, f"it was written by another version of deskrl (schema {record['schema']})")
            return Checkpoint(path, int(record["num_updates"]), record["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(path, f"it is no checkpoint of a learner ({_one_line(error)})") from error

    def check_whole(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if a file of it is missing or cut short, or it is of another model or layout of ranks."""
        record = json.loads((checkpoint.path / RECORD).read_text(encoding="utf-8"))
        for name, num_bytes in record["files"].items():
            file = checkpoint.path / name
            if not file.is_file() or file.stat().st_size != num_bytes:
                raise self._refusal(checkpoint.path, f"{name} is missing or cut short")
        for key, value in self.layout.items():
            if record["layout"].get(key) != value:
                raise UserError(
                    f"{checkpoint.path} was written with {key} = {record['layout'].get(key)}, this run has {value}",
                    f"start with the same {key}, or under another name",
                )

    def _refusal(self, path: Path, reason: str) -> UserError:
        return UserError(f"{path}: {reason}", "remove it to go on from the checkpoint before it, or restore it")


def layout_of(config: RunConfig, num_ranks: int) -> dict[str, Any]:
    """What a checkpoint's engine state depends on, by the names of the configuration."""
    return {
        "learner.num_processes": num_ranks,
        "learner.zero_stage": config.learner.zero_stage,
        "learner.dtype": config.learner.dtype,
    }


def refuse_unreadable(config: RunConfig) -> None:
    """Raise UserError if a run could not go on from its checkpoints; imports no engine, so a start can ask first."""
    folder = RunFolder(config.folder).checkpoints
    if any(folder.glob("epoch_*")):
        layout = layout_of(config, config.learner.num_processes)
        CheckpointStore(folder, config.model_folder, layout).newest()


def checkpoint_name(num_updates: int, groups_per_batch: int, num_tasks: int) -> str:
    """`epoch_N` for the update that ends pass N over the task list, `epoch_N_update_U` for one on the way."""
    epoch = num_updates * groups_per_batch // num_tasks
    ends_epoch = num_updates == 0 or epoch > (num_updates - 1) * groups_per_batch // num_tasks
    return f"epoch_{epoch}" if ends_epoch else f"epoch_{epoch}_update_{num_updates}"


def _fingerprint(model_folder: Path) -> str:
    """What tells one architecture from another: the model's configuration, its numeric type apart."""
    try:
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_folder}: its config.json cannot be read ({_one_line(error)})", "name a complete model folder"
        ) from error
    set_dtype(config, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def set_dtype(config: dict[str, Any], dtype: str | None) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
