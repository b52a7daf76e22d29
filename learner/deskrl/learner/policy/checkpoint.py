"""Checkpoints: a model folder that transformers and vLLM load, beside what it takes to go on.

    checkpoints/epoch_N/              after N passes over the task list (epoch_N_update_U between two of them)
        model.safetensors, config.json, tokenizer and processor files
        engine/                       optimizer and master weights, as DeepSpeed writes them
        learner.json                  the learner's counters, written last, with the size of every file
    checkpoints/latest                link to the newest
    checkpoints/lineages.json         every lineage of the run (see lineage.py)

A checkpoint appears whole or not at all: it is written under a name that nobody reads, made durable, then renamed.
There are no random states to keep: everything random follows from the run's seed and the counters. Knows files; knows
nothing of what the counters mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
_FULL_BYTES = 1024**2
"""With less than this left, whatever failed to be written failed for want of space."""
_RECORD = "learner.json"
"""What a learner keeps of itself beside the model and the engine's state."""
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


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
        keep: how many stay.
    """

    def __init__(self, folder: Path, model_folder: Path, layout: Mapping[str, Any], keep: int) -> None:
        self._folder = folder
        self._model_folder = model_folder
        self._layout = {**layout, "model": _fingerprint(model_folder)}
        self._keep = keep
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
        paths = [path for path in self._folder.glob("epoch_*") if path.is_dir()]
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

    def save(self, name: str, engine: Engine, num_updates: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and make it the newest; a collective call.

        Args:
            name: of its folder.
            engine: whose weights and optimizer are saved.
            num_updates: optimizer updates behind it.
            state: the learner's counters, as JSON.

        Raises:
            UserError: the disk is full. What was written of it is removed, and the checkpoint before it stands.
        """
        final, partial = self._folder / name, self._folder / f".{name}.partial"
        try:
            self._write(final, partial, engine, num_updates, state)
        except Exception:  # each writer has an error of its own for a full disk
            refusal = _full_disk(self._folder)
            if refusal is None:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise refusal from None
        return final

    def _write(self, final: Path, partial: Path, engine: Engine, num_updates: int, state: Mapping[str, Any]) -> None:
        if engine.rank == 0:
            self._sweep()
            partial.mkdir()
        engine.barrier()
        engine.save(partial / "engine")
        weights = engine.weights()
        engine.barrier()
        if engine.rank == 0:
            self._write_model(partial, weights)
            sizes = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
            record = {"schema": SCHEMA, "num_updates": num_updates, "layout": self._layout, "files": sizes}
            (partial / _RECORD).write_text(json.dumps({**record, "state": state}), encoding="utf-8")
            _make_durable(partial)
            self._publish(partial, final)
        engine.barrier()

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
            record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise self._refusal(path, f"it was written by another version of deskrl (schema {record['schema']})")
            return Checkpoint(path, int(record["num_updates"]), record["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(path, f"it is no checkpoint of a learner ({_one_line(error)})") from error

    def check_whole(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if a file of it is missing or cut short, or it is of another model or layout of ranks."""
        record = json.loads((checkpoint.path / _RECORD).read_text(encoding="utf-8"))
        for name, num_bytes in record["files"].items():
            file = checkpoint.path / name
            if not file.is_file() or file.stat().st_size != num_bytes:
                raise self._refusal(checkpoint.path, f"{name} is missing or cut short")
        for key, value in self._layout.items():
            if record["layout"].get(key) != value:
                raise UserError(
                    f"{checkpoint.path} was written with {key} = {record['layout'].get(key)}, this run has {value}",
                    f"start with the same {key}, or under another name",
                )

    def _write_model(self, folder: Path, weights: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        for source in self._model_folder.iterdir():
            is_own = source.name == _RECORD  # of the run that this one began from
            if source.is_file() and not is_own and not source.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(source, folder / source.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _set_dtype(config, str(next(iter(weights.values())).dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})

    def _publish(self, partial: Path, final: Path) -> None:
        if final.exists():  # left by a run that lost its newer checkpoints
            shutil.rmtree(final)
        os.rename(partial, final)
        link = self._folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self._folder / "latest")
        _sync(self._folder)
        self._remove_old()

    def _remove_old(self) -> None:
        for checkpoint in self.found()[: -self._keep]:
            # First out of sight, so that a half removed one is never taken for a damaged one.
            hidden = self._folder / f".{checkpoint.path.name}.partial"
            os.rename(checkpoint.path, hidden)
            shutil.rmtree(hidden)

    def _sweep(self) -> None:
        """Remove what a killed learner left half written or half removed."""
        for path in self._folder.glob(".*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def _refusal(self, path: Path, reason: str) -> UserError:
        return UserError(f"{path}: {reason}", "remove it to go on from the checkpoint before it, or restore it")


def _full_disk(folder: Path) -> UserError | None:
    """The refusal, if nothing more fits on the disk of a folder."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= _FULL_BYTES:
        return None
    mend = "free some space and start again: the newest checkpoint stands, and nothing acknowledged is lost"
    return UserError(f"the disk of {folder} is full: a checkpoint does not fit", mend)


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
        CheckpointStore(folder, config.model_folder, layout, config.learner.keep_checkpoints).newest()


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
    _set_dtype(config, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _set_dtype(config: dict[str, Any], dtype: str | None) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype


def _make_durable(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
