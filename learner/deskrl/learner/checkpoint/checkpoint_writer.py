"""Checkpoint writer: copies the state to host memory, then writes it to disk in a background thread.

If the copy does not fit into memory, training waits until the checkpoint is written. A checkpoint is written to a
hidden folder, synchronised to disk (fsync) and then renamed, so that it is either complete or invisible.
`torch.distributed.checkpoint.async_save` would write another format than DeepSpeed's own.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch import Tensor

from deskrl.core.errors import UserError
from deskrl.learner.available_memory import available_bytes
from deskrl.learner.checkpoint.checkpoint_files import RECORD, SCHEMA, CheckpointStore, copy_model_files, set_dtype
from deskrl.learner.checkpoint.model_card import CARD
from deskrl.learner.policy import lora
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.pinned_copy import PinnedCopier

_FULL_BYTES = 1024**2
"""Free space in bytes below which a failed write is attributed to a full disk."""
_MEMORY_SHARE = 0.8
"""Fraction of the available memory that a copy may use; the other processes continue while it is held."""

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """The part of a checkpoint that one rank writes."""

    name: str
    num_updates: int
    state: Mapping[str, Any]
    """The learner's counters, as JSON."""
    files: Mapping[Path, Any]
    """Contents of DeepSpeed's files by path; the tensors are live ones or copies."""
    weights: Mapping[str, Tensor]
    """Tensors of the model or its adapter on rank 0, empty on other ranks."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time.

    Args:
        store: store of the run's checkpoints.
        engine: engine whose state is written.
        keep: number of checkpoints to keep.
        write_card: writes the model card, given the folder and the learner's counters; None: no card.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: DeepSpeedEngine,
        keep: int,
        write_card: Callable[[Path, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._store = store
        self._folder = store.folder
        self._engine = engine
        self._keep = keep
        self._write_card = write_card
        self._copier = PinnedCopier()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, name: str, num_updates: int, state: Mapping[str, Any]) -> None:
        """Copy the state and start writing it; a collective call, allowed after `finish` has returned True.

        Args:
            name: folder name of the checkpoint.
            num_updates: optimizer updates before the checkpoint.
            state: the learner's counters, as JSON.

        Raises:
            UserError: the disk is full.
        """
        assert self._writing is None
        started_s = time.perf_counter()
        partial = self._partial(name)
        with self._full_disk_as_user_error(partial):
            if self._engine.rank == 0:
                self._remove_partial_folders()
                partial.mkdir()
            self._engine.barrier()
            files = self._engine.state_files(partial / "engine")
            self._copier.begin()
            weights = self._engine.trained_tensors(self._copier)
        # Gathered weights of a sharded model are copies already.
        live = files, {} if self._engine.shards_parameters else weights
        tensors = _tensors(live)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        room_bytes = self._copier.kept_bytes + int(_MEMORY_SHARE * available_bytes()) // self._engine.num_local_ranks
        if copies := num_bytes <= room_bytes:
            files, copied_weights = self._copied(live, tensors)
            weights = copied_weights or weights
        copied_s = time.perf_counter() - started_s
        self._writing = self._thread.submit(self._write, Content(name, num_updates, state, files, weights), copied_s)
        if not copies:
            _log.warning(
                "training waits until checkpoint %s is written: its copy needs %.1f GB of memory, %.1f GB are free",
                *(name, num_bytes / 1e9, room_bytes / 1e9),
            )
            self._writing.exception()

    def finish(self, wait: bool = True) -> bool:
        """Return whether no checkpoint is being written, so that the one begun last is on disk.

        Args:
            wait: whether to wait until it is written.

        Raises:
            UserError: the disk was full. The partial checkpoint is removed, and the previous one remains.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()
        return self._writing is None

    def close(self) -> None:
        """Wait for the checkpoint in progress; its errors are ignored in favour of the one that ends the learner."""
        self._thread.shutdown()

    def _copied(self, value: Value, tensors: Mapping[tuple[Any, ...], Tensor]) -> Value:
        """Return a deep copy of a nested value with its tensors copied to host memory."""
        copies = dict(zip(tensors, self._copier.copy(list(tensors.values())), strict=True))

        def copied(leaf: Any) -> Any:
            return copies[_identity(leaf)] if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

        result: Value = pytree.tree_map(copied, value)
        return result

    # Methods of the background thread.

    def _write(self, content: Content, copied_s: float) -> None:
        started_s = time.perf_counter()
        partial = self._partial(content.name)
        with self._full_disk_as_user_error(partial):
            for path, value in content.files.items():
                torch.save(value, path)
            _fsync(content.files)
            self._engine.checkpoint_barrier()
            if self._engine.rank == 0:
                copy_model_files(self._store.model_folder, partial)
                self._write_weights(partial, content.weights)
                if self._write_card is not None:
                    self._write_card(partial, content.state)
                self._write_record(partial, content)
                _fsync([*partial.rglob("*"), partial])
                self._rename_and_prune(partial, content.name)
        written_s = time.perf_counter() - started_s
        _log.info("checkpoint %s: copied in %.1f s, written in %.1f s", content.name, copied_s, written_s)

    def _write_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        adapter = self._engine.policy.adapter
        if adapter is not None:
            adapter.save_config(folder, self._store.model_folder)
            save_file(whole, folder / lora.WEIGHTS, metadata={"format": "pt"})
            return
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        set_dtype(config, str(next(iter(whole.values())).dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    def _write_record(self, folder: Path, content: Content) -> None:
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        sizes.pop(CARD, None)  # users edit it
        record = {
            "schema": SCHEMA,
            "num_updates": content.num_updates,
            "layout": self._store.layout,
            "files": sizes,
            "state": content.state,
        }
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    def _rename_and_prune(self, partial: Path, name: str) -> None:
        final = self._folder / name
        if final.exists():  # left by a run whose newer checkpoints were removed
            shutil.rmtree(final)
        os.rename(partial, final)
        link = self._folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._folder / "latest")
        _fsync([self._folder])
        for checkpoint in self._store.list_all()[: -self._keep]:
            # Renamed first, so that a partly removed checkpoint is not mistaken for a damaged one.
            hidden = self._partial(checkpoint.path.name)
            os.rename(checkpoint.path, hidden)
            shutil.rmtree(hidden)

    # Files and folders.

    def _partial(self, name: str) -> Path:
        return self._folder / f".{name}.partial"

    def _remove_partial_folders(self) -> None:
        """Remove checkpoints that a killed learner left partly written or partly removed."""
        for path in self._folder.glob(".*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    @contextmanager
    def _full_disk_as_user_error(self, partial: Path) -> Iterator[None]:
        """Convert errors within the context to UserError if the disk is full, and remove the partial checkpoint."""
        try:
            yield
        except Exception:  # torch, safetensors and Python raise different errors when the disk is full
            if shutil.disk_usage(self._folder).free >= _FULL_BYTES:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the disk of {self._folder} is full: a checkpoint does not fit",
                "free some space and start again; the run resumes from the newest checkpoint",
            ) from None


def _tensors(value: Any) -> dict[tuple[Any, ...], Tensor]:
    """Return all tensors in a nested value; identical views of the same memory appear once."""
    return {_identity(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _fsync(paths: Iterable[Path]) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
