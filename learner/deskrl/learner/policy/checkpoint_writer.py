"""Writes checkpoints while learning goes on: what they hold is copied at one moment, and a thread brings it to disk.

Where the copy does not fit into memory, the learner waits until everything is written, as slow as that is. A checkpoint
is written under a name that nobody reads, made durable, then renamed. Knows files, memory and ranks; knows nothing of
what the counters mean.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
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
from deskrl.core.memory import available_bytes
from deskrl.learner.policy.checkpoint import RECORD, SCHEMA, CheckpointStore, set_dtype
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.host_copy import HostCopier

_FULL_BYTES = 1024**2
"""With less than this left on disk, whatever failed to be written failed for want of space."""
_MEMORY_SHARE = 0.8
"""Of the memory that is left, how much a copy may take: acting and learning go on beside it."""
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")

Value = TypeVar("Value")

_log = logging.getLogger("deskrl.learner")


@dataclass(frozen=True)
class Content:
    """What one rank writes of a checkpoint."""

    name: str
    num_updates: int
    state: Mapping[str, Any]
    """The learner's counters, as JSON."""
    files: Mapping[Path, Any]
    """DeepSpeed's files; their tensors live ones, or copies."""
    weights: Mapping[str, Tensor]
    """The model's, on rank 0."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time.

    Args:
        store: where they are found afterwards.
        engine: whose state they hold.
        keep: how many stay.
    """

    def __init__(self, store: CheckpointStore, engine: Engine, keep: int) -> None:
        self._store = store
        self._folder = store.folder
        self._engine = engine
        self._keep = keep
        self._copier = HostCopier()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, name: str, num_updates: int, state: Mapping[str, Any]) -> None:
        """Take what the checkpoint holds, and begin to write it; a collective call, after `finish`.

        Args:
            name: of its folder.
            num_updates: optimizer updates behind it.
            state: the learner's counters, as JSON.

        Raises:
            UserError: the disk is full.
        """
        assert self._writing is None
        started_s = time.perf_counter()
        partial = self._partial(name)
        with self._full_disk_refused(partial):
            if self._engine.rank == 0:
                self._sweep()
                partial.mkdir()
            self._engine.barrier()
            files = self._engine.state_files(partial / "engine")
            self._copier.begin()
            weights = self._engine.model_tensors(self._copier)
        # Sharded weights are copies by now: they had to be gathered.
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
                "nothing is learnt while checkpoint %s is written: its copy takes %.1f GB, memory has room for %.1f GB",
                *(name, num_bytes / 1e9, room_bytes / 1e9),
            )
            self._writing.exception()

    def finish(self, wait: bool = True) -> bool:
        """Whether all that was begun is written, and the newest checkpoint is the one begun last.

        Args:
            wait: until it is.

        Raises:
            UserError: the disk was full. What was written is removed, and the checkpoint before it stands.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()
        return self._writing is None

    def close(self) -> None:
        """Wait for what was begun; no error is raised, as the one that ends the learner is more telling."""
        self._thread.shutdown()

    def _copied(self, value: Value, tensors: Mapping[tuple[Any, ...], Tensor]) -> Value:
        """The same with nothing in it that changes any more, its tensors on the CPU."""
        copies = dict(zip(tensors, self._copier.copy(list(tensors.values())), strict=True))

        def copied(leaf: Any) -> Any:
            return copies[_identity(leaf)] if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

        result: Value = pytree.tree_map(copied, value)
        return result

    # In the thread.

    def _write(self, content: Content, copied_s: float) -> None:
        started_s = time.perf_counter()
        partial = self._partial(content.name)
        with self._full_disk_refused(partial):
            for path, value in content.files.items():
                torch.save(value, path)
            _make_durable(content.files)
            self._engine.meet_writers()
            if self._engine.rank == 0:
                self._write_model(partial, content.weights)
                self._write_record(partial, content)
                _make_durable([*partial.rglob("*"), partial])
                self._publish(partial, content.name)
        written_s = time.perf_counter() - started_s
        _log.info("checkpoint %s: copied in %.1f s, written in %.1f s", content.name, copied_s, written_s)

    def _write_model(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        for source in self._store.model_folder.iterdir():
            is_own = source.name == RECORD  # of the run that this one began from
            if source.is_file() and not is_own and not source.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(source, folder / source.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        set_dtype(config, str(next(iter(weights.values())).dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    def _write_record(self, folder: Path, content: Content) -> None:
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        record = {
            "schema": SCHEMA,
            "num_updates": content.num_updates,
            "layout": self._store.layout,
            "files": sizes,
            "state": content.state,
        }
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    def _publish(self, partial: Path, name: str) -> None:
        final = self._folder / name
        if final.exists():  # left by a run that lost its newer checkpoints
            shutil.rmtree(final)
        os.rename(partial, final)
        link = self._folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._folder / "latest")
        _make_durable([self._folder])
        for checkpoint in self._store.found()[: -self._keep]:
            # First out of sight, so that a half removed one is never taken for a damaged one.
            hidden = self._partial(checkpoint.path.name)
            os.rename(checkpoint.path, hidden)
            shutil.rmtree(hidden)

    # Files.

    def _partial(self, name: str) -> Path:
        return self._folder / f".{name}.partial"

    def _sweep(self) -> None:
        """Remove what a killed learner left half written or half removed."""
        for path in self._folder.glob(".*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    @contextmanager
    def _full_disk_refused(self, partial: Path) -> Iterator[None]:
        """Raises UserError for whatever fails within while the disk is full, and removes what was written."""
        try:
            yield
        except Exception:  # each writer has an error of its own for a full disk
            if shutil.disk_usage(self._folder).free >= _FULL_BYTES:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the disk of {self._folder} is full: a checkpoint does not fit",
                "free some space and start again: the newest checkpoint stands, and nothing acknowledged is lost",
            ) from None


def _tensors(value: Any) -> dict[tuple[Any, ...], Tensor]:
    """All tensors within dicts, lists and tuples; those that show the same memory in the same way are one."""
    return {_identity(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _make_durable(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
