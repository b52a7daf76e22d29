"""Where a run keeps what: one folder, the same for every role. Knows paths and the metrics file, not what they mean."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunFolder:
    """Paths of one run, and its append-only metrics file.

    config.json, metrics.jsonl, report.html, checkpoints/epoch_N/, results/, scores/, logs/, replay/, model/,
    supervisor.json.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.metrics = root / "metrics.jsonl"
        self.report = root / "report.html"
        self.checkpoints = root / "checkpoints"
        self.results = root / "results"
        self.scores = root / "scores"
        self.logs = root / "logs"
        self.replay = root / "replay"
        self.supervisor = root / "supervisor.json"
        self.lock = root / ".lock"

    def create(self) -> None:
        """Make what is missing."""
        for folder in (
            self.root,
            self.checkpoints,
            self.results,
            self.results / "task_results",
            self.logs,
            self.replay,
        ):
            folder.mkdir(parents=True, exist_ok=True)

    def append_metrics(self, kind: str, **values: Any) -> None:
        """Add one line to metrics.jsonl: `kind` and the wall clock beside the values.

        Raises:
            OSError: the disk is full. The line may be torn then; the next one begins anew all the same.
        """
        line = (json.dumps({"kind": kind, "unix_s": round(time.time(), 3), **values}) + "\n").encode()
        descriptor = os.open(self.metrics, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))
        finally:
            os.close(descriptor)

    def is_saving(self, within_s: float) -> bool:
        """Whether anything was written, this short a time ago, of a checkpoint that is not whole yet."""
        since_unix_s = time.time() - within_s
        for path in self.checkpoints.glob(".*.partial/**/*"):
            with contextlib.suppress(FileNotFoundError):  # it became whole meanwhile
                if path.stat().st_mtime > since_unix_s:
                    return True
        return False

    def read_metrics(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl of one kind (or all); a torn line is left out."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind is None or record.get("kind") == kind:
                yield record


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: readers see the old or the new, and after a crash one of them is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
