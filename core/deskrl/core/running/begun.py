"""What an earlier start of a run left in its folder: how far it came, and as what it was begun. Changes nothing."""

from __future__ import annotations

import json
from typing import Any

from deskrl.core.config import RunConfig, dotted, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder


def read_state(folder: RunFolder) -> dict[str, Any]:
    """What an earlier start noted; empty before the first."""
    if not folder.supervisor.exists():
        return {}
    try:
        state: dict[str, Any] = json.loads(folder.supervisor.read_text(encoding="utf-8"))
        return {"state": state["state"], "started_unix_s": float(state["started_unix_s"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.supervisor} is damaged", "restore it, or choose another --name") from error


def is_finished(folder: RunFolder) -> bool:
    """Whether the run came to its end and was judged."""
    return read_state(folder).get("state") == "finished"


def has_learnt(folder: RunFolder) -> bool:
    """Whether the learner of this run has ever got under way. Before, a mended configuration may take its place."""
    return any(folder.checkpoints.glob("epoch_*")) or any(True for _ in folder.read_metrics("phase"))


def refuse_other_config(config: RunConfig, folder: RunFolder) -> None:
    """A run goes on as what it was begun as."""
    if changed := changed_keys(read_resolved(folder.config), config):
        raise UserError(
            f"{folder.root} was begun with other values of {', '.join(changed)}",
            "resume it as it was, remove it, or choose another --name",
        )


def changed_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """Dotted keys whose values differ, in the other's order."""
    values = dict(dotted(json.loads(one.model_dump_json())))
    return [key for key, value in dotted(json.loads(other.model_dump_json())) if values.get(key) != value]
