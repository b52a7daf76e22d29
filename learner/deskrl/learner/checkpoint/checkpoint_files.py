"""Checkpoint files: layout, lookup and validation of the checkpoints of a run.

A checkpoint is a model folder that transformers and vLLM can load, together with the state needed to resume:

    checkpoints/epoch_N/              after N passes over the task list (epoch_N_update_U between two of them)
        model.safetensors, config.json, tokenizer and processor files
        engine/                       optimizer state and master weights, as DeepSpeed's ranks write them
        learner.json                  the learner's counters and the size of every file, written last
    checkpoints/latest                link to the newest checkpoint
    checkpoints/lineages.json         every lineage of the run (see policy_versions.py)
    checkpoints/reference.json        fingerprint of the reference policy, with a KL penalty

With LoRA, `adapter_model.safetensors` and `adapter_config.json` are in place of `model.safetensors`, in peft's format.

Checkpoints are written atomically (see checkpoint_writer.py). They contain no random states because all randomness is
derived from the run's seed and the counters. Any number of ranks resumes from one (see policy/resharding.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.config import RunConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object, write_json
from deskrl.core.run_dir import RunDir
from deskrl.learner.policy_versions import LineageTree
from deskrl.models.model_checks import fingerprint_weights

if TYPE_CHECKING:
    from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine

SCHEMA = 1
RECORD = "learner.json"
"""File with the learner's own state."""
_OWN_FILES = (RECORD, "README.md", ".gitignore")
"""Files that a checkpoint has of its own, and that describe another model if the initial one is a checkpoint too."""
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
_LORA_RANK, _BASE = "learner.lora.rank", "base model"
_DEFAULTS = {_LORA_RANK: 0}
"""Layout of checkpoints that were written before the key existed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    num_updates: int
    """Optimizer updates before the checkpoint."""
    state: Mapping[str, Any]


class CheckpointStore:
    """Checkpoints of one run.

    Args:
        folder: `checkpoints/` in the run directory.
        model_folder: folder of the initial model, whose configuration and processor are copied to every checkpoint.
        layout: settings that the engine state depends on, see `layout_of`.
    """

    def __init__(self, folder: Path, model_folder: Path, layout: Mapping[str, Any]) -> None:
        self.folder = folder
        self.model_folder = model_folder
        self.layout = {**layout, "model": _fingerprint(model_folder)}
        if layout.get(_LORA_RANK):  # checkpoints contain an adapter only
            self.layout[_BASE] = fingerprint_weights(model_folder)
        self._lineages = folder / "lineages.json"

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None if there is none.

        Raises:
            UserError: it cannot be read, or belongs to another model or another layout.
        """
        checkpoints = self.list_all()
        if not checkpoints:
            return None
        self.check_usable(checkpoints[-1])
        return checkpoints[-1]

    def list_all(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first; raise UserError if one is not a valid checkpoint."""
        paths = [path for path in self.folder.glob("epoch_*") if path.is_dir()]
        return sorted(map(self._read, paths), key=lambda checkpoint: checkpoint.num_updates)

    def load(self, checkpoint: Checkpoint, engine: DeepSpeedEngine) -> None:
        """Restore weights and optimizer; a collective call.

        Raises:
            UserError: DeepSpeed cannot read the engine state.
        """
        try:
            engine.load(checkpoint.path / "engine")
        except Exception as error:  # unpickling and DeepSpeed raise errors of many types
            raise self._refusal(checkpoint.path, f"the engine state cannot be read ({one_line(error, 300)})") from error

    def read_lineages(self) -> LineageTree:
        """Return all lineages of the run."""
        if not self._lineages.exists():
            return LineageTree(())
        try:
            return LineageTree.from_json(json.loads(self._lineages.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._refusal(self._lineages, f"cannot be read ({one_line(error, 300)})") from error

    def write_lineages(self, tree: LineageTree) -> None:
        """Write the lineages; must precede any action sampled under the newest one."""
        write_json(self._lineages, tree.to_json())

    def _read(self, path: Path) -> Checkpoint:
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise self._refusal(path, f"written by another version of deskrl (schema {record['schema']})")
            return Checkpoint(path, int(record["num_updates"]), record["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(path, f"not a valid checkpoint ({one_line(error, 300)})") from error

    def check_usable(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if a file is missing or truncated, or the checkpoint belongs to another model or layout."""
        record = json.loads((checkpoint.path / RECORD).read_text(encoding="utf-8"))
        for name, num_bytes in record["files"].items():
            file = checkpoint.path / name
            if not file.is_file() or file.stat().st_size != num_bytes:
                raise self._refusal(checkpoint.path, f"{name} is missing or truncated")
        written = {**_DEFAULTS, **record["layout"]}
        for key, value in self.layout.items():
            if written.get(key) == value:
                continue
            if key == _BASE:
                problem, hint = f"its adapter belongs to another model than {self.model_folder}", "model.path"
            else:
                problem, hint = f"was written with {key} = {written.get(key)}, this run has {value}", key
            raise UserError(
                f"{checkpoint.path}: {problem}", f"use the same {hint}, or start a new run under another name"
            )

    def _refusal(self, path: Path, reason: str) -> UserError:
        return UserError(f"{path}: {reason}", "restore it, or remove it to resume from the previous checkpoint")


def layout_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a checkpoint's engine state depends on, by configuration key.

    The number of ranks is not among them: see resharding.py.
    """
    lora = config.learner.lora
    layout: dict[str, Any] = {
        "learner.zero_stage": config.learner.zero_stage,
        "learner.dtype": config.learner.dtype,
        _LORA_RANK: lora.rank,
    }
    if lora.rank:
        layout |= {
            "learner.lora.alpha": lora.alpha,
            "learner.lora.targets": sorted(lora.targets),
            "learner.lora.vision_targets": sorted(lora.vision_targets),
        }
    return layout


def base_fingerprint(checkpoint: Path) -> str | None:
    """Return the fingerprint of the model that a checkpoint's adapter belongs to; None if it is not recorded."""
    if not (checkpoint / RECORD).is_file():
        return None
    layout = read_json_object(checkpoint / RECORD, "restore the checkpoint").get("layout")
    return layout.get(_BASE) if isinstance(layout, dict) else None


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the processor and other files of a model folder that hold no weights."""
    for path in source.iterdir():
        if path.is_file() and path.name not in _OWN_FILES and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)


def check_can_resume(config: RunConfig) -> None:
    """Raise UserError if a run cannot resume from its newest checkpoint; imports neither torch nor DeepSpeed."""
    folder = RunDir(config.run_dir).checkpoints
    if any(folder.glob("epoch_*")):
        CheckpointStore(folder, config.model_folder, layout_of(config)).newest()


def checkpoint_name(num_updates: int, groups_per_batch: int, num_tasks: int) -> str:
    """Return `epoch_N` if the update ends pass N over the task list, otherwise `epoch_N_update_U`."""
    epoch = num_updates * groups_per_batch // num_tasks
    ends_epoch = num_updates == 0 or epoch > (num_updates - 1) * groups_per_batch // num_tasks
    return f"epoch_{epoch}" if ends_epoch else f"epoch_{epoch}_update_{num_updates}"


def _fingerprint(model_folder: Path) -> str:
    """Return a hash of the model's configuration without its numeric type, which identifies the architecture."""
    try:
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_folder}/config.json: cannot be read ({one_line(error, 300)})",
            "set model.path to a complete model folder",
        ) from error
    set_dtype(config, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def set_dtype(config: dict[str, Any], dtype: str | None) -> None:
    """Set the numeric type everywhere in a model configuration, in place."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
