"""State of a run directory that an earlier start left: progress and configuration (read only)."""

from __future__ import annotations

import json
import time
from typing import Any

from deskrl.core.config import RunConfig, dotted, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir
from deskrl.launch.port_assignment import PORT_KEYS


def read_state(folder: RunDir) -> dict[str, Any]:
    """Return the recorded state of the run; empty if it was never started."""
    if not folder.supervisor.exists():
        return {}
    try:
        state: dict[str, Any] = json.loads(folder.supervisor.read_text(encoding="utf-8"))
        return {"state": state["state"], "started_unix_s": float(state["started_unix_s"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.supervisor}: damaged", "restore it, or choose another --name") from error


def is_finished(folder: RunDir) -> bool:
    """Return whether the run finished and was judged."""
    return read_state(folder).get("state") == "finished"


def record_failure(folder: RunDir) -> None:
    """Record that a role failed permanently; the next start of the run replaces this."""
    started_unix_s = read_state(folder).get("started_unix_s", time.time())
    write_json(folder.supervisor, {"state": "failed", "started_unix_s": started_unix_s})


def has_started_training(folder: RunDir) -> bool:
    """Return whether the learner of this run ever started. Until then the configuration may still be changed."""
    return any(folder.checkpoints.glob("epoch_*")) or any(True for _ in folder.read_metrics("phase"))


def is_evaluation(folder: RunDir) -> bool:
    """Return whether the directory was written by `deskrl eval`: that of an evaluation or of one of its task sets."""
    root = folder.root.resolve()
    return any((root / path).is_file() for path in ("evaluation.json", "../../evaluation.json"))


def check_is_run(folder: RunDir, action: str) -> None:
    """Check that a directory contains a training run.

    Args:
        folder: run directory.
        action: what needs a training run, for the message.

    Raises:
        UserError: the directory does not exist, or contains an evaluation, a sweep or nothing.
    """
    if is_evaluation(folder):
        raise UserError(f"{folder.root}: is an evaluation, which has no updates: {action}", "name a training run")
    if (folder.root / "sweep.json").is_file():
        raise UserError(f"{folder.root}: is a sweep: {action}", f"name one of its runs, such as {folder.root}/ARM-s0")
    if not folder.config.is_file():
        what = "contains no run" if folder.root.is_dir() else "not found"
        raise UserError(f"{folder.root}: {what}", "give the directory of a run that was started")


def check_same_config(config: RunConfig, folder: RunDir) -> None:
    """Check that a run is resumed with the configuration that it was started with.

    Keys without influence on its results may differ: ports, hosts and trackers.

    Raises:
        UserError: a value differs.
    """
    if changed := [key for key in changed_keys(read_resolved(folder.config), config) if influences_results(key)]:
        raise UserError(
            f"{folder.root}: started with other values of {', '.join(changed)}",
            "resume it with the original values, remove it, or choose another --name",
        )


def influences_results(key: str) -> bool:
    """Return whether a configuration key has an influence on what a run or an evaluation results in."""
    return key not in PORT_KEYS and key.partition(".")[0] not in ("tracker", "tracker_options")


def changed_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the dotted keys whose values differ, in the order of `other`."""
    values = dict(dotted(json.loads(one.model_dump_json())))
    return [key for key, value in dotted(json.loads(other.model_dump_json())) if values.get(key) != value]
