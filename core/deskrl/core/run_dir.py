"""Run directory: the paths of one run's files, its metrics file and its task files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object, write_atomically, write_json

_PREPARE_HINT = "start the run with `deskrl up`, or `deskrl prepare` it"
_CORPUS_SEPARATOR = "\f"


class RunDir:
    """Paths in a run directory, which has the same layout for every role.

    Args:
        root: path of the run directory.

    Attributes:
        config: resolved configuration of the run.
        metrics: append-only metrics, one JSON object per line.
        report: HTML report.
        checkpoints: directory of the learner's checkpoints.
        reference: fingerprint of the reference policy; missing without a KL penalty.
        results: directory of result files.
        task_results: directory of one result file per task.
        acceptance: acceptance criteria of a finished run.
        checkpoint_proof: result of comparing the last checkpoint with the served weights.
        token_stats: directory of token statistics, one file per batch.
        logs: directory of one log file per role.
        replay: directory of the replay service, or a link to it if `replay.folder` is set.
        supervisor: state and processes of the supervisor.
        lock: file that the supervisor of the run holds locked.
        id: random id of the run, by which its processes recognise one another.
        tasks: tasks of the run; see `write_tasks`.
        applications: application of each task; see `write_tasks`.
        corpus: training text of a tokenizer; see `write_tasks`.
        built_model: what the agent requires of a built model; see `write_built_model`.
        demonstrations: imitated demonstrations; see `core.imitation_data`. Missing unless the run imitates a folder.
        left_out: tasks that the run excludes, with the reasons; missing if there are none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.metrics = root / "metrics.jsonl"
        self.report = root / "report.html"
        self.checkpoints = root / "checkpoints"
        self.reference = self.checkpoints / "reference.json"
        self.results = root / "results"
        self.task_results = self.results / "task_results"
        self.acceptance = self.results / "acceptance.json"
        self.checkpoint_proof = self.results / "checkpoint_proof.json"
        self.token_stats = root / "scores"
        self.logs = root / "logs"
        self.replay = root / "replay"
        self.supervisor = root / "supervisor.json"
        self.lock = root / ".lock"
        self.id = root / "run_id"
        self.tasks = root / "tasks.json"
        self.applications = root / "applications.json"
        self.corpus = root / "corpus.txt"
        self.built_model = root / "built_model.json"
        self.demonstrations = root / "demonstrations"
        self.left_out = root / "left_out.json"

    def create(self) -> None:
        """Create the directories that are missing, and the id of the run."""
        for folder in (self.root, self.checkpoints, self.results, self.task_results, self.logs, self.replay):
            if not folder.is_symlink():  # of `replay.folder`, which this machine may not have
                folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(self.id, "x", encoding="ascii") as file:
            file.write(uuid.uuid4().hex)

    def read_id(self) -> str:
        """Return the id of the run; empty if this machine does not have the run directory, or an older one."""
        try:
            text = self.id.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""
        return text if re.fullmatch("[0-9a-f]{32}", text) else ""

    def write_tasks(
        self, tasks: Mapping[str, Mapping[str, Any]], applications: Mapping[str, str], corpus: Sequence[str]
    ) -> None:
        """Write the files by which the other roles know the tasks.

        Args:
            tasks: content of the task file by task id, in the order of the task list.
            applications: name of the application by task id.
            corpus: texts that the policy reads and writes in these tasks, to train the tokenizer of a built model.
        """
        write_json(self.tasks, tasks)
        write_json(self.applications, applications)
        write_atomically(self.corpus, _CORPUS_SEPARATOR.join(corpus).encode())

    def read_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the content of the task file by task id, in the order of the task list.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_json_object(self.tasks, _PREPARE_HINT)

    def read_applications(self) -> dict[str, str]:
        """Return the name of the application by task id.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_json_object(self.applications, _PREPARE_HINT)

    def read_corpus(self) -> list[str]:
        """Return the texts on which the tokenizer of a built model is trained.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return self.corpus.read_text(encoding="utf-8").split(_CORPUS_SEPARATOR)
        except OSError as error:
            raise UserError(f"{self.corpus}: cannot be read: {error.strerror}", _PREPARE_HINT) from error

    def write_built_model(self, architecture: str, largest_number: int) -> None:
        """Write what the agent requires of a model that the run builds.

        Args:
            architecture: name of its architecture.
            largest_number: largest coordinate of an action.
        """
        write_json(self.built_model, {"architecture": architecture, "largest_number": largest_number})

    def read_built_model(self) -> tuple[str, int]:
        """Return architecture and largest number of `write_built_model`.

        Raises:
            UserError: the file is missing or damaged.
        """
        content = read_json_object(self.built_model, _PREPARE_HINT)
        return str(content["architecture"]), int(content["largest_number"])

    def append_metrics(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl: the kind, the wall-clock time and the values.

        Raises:
            OSError: the disk is full. The line may be incomplete; the next call starts a new line.
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

    def is_writing_checkpoint(self, within_s: float) -> bool:
        """Return whether an incomplete checkpoint was written to within the last `within_s` seconds."""
        since_unix_s = time.time() - within_s
        for path in self.checkpoints.glob(".*.partial/**/*"):
            with contextlib.suppress(FileNotFoundError):  # the checkpoint was completed and renamed in the meantime
                if path.stat().st_mtime > since_unix_s:
                    return True
        return False

    def read_metrics(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl of one kind, or of all kinds; incomplete lines are skipped."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind is None or record.get("kind") == kind:
                yield record
