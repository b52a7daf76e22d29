"""Paths of OSWorld's file cache."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from deskrl.actor.tasks.assets import asset_dir, url_key


def osworld_cache_path(task_id: str, url: str, name: str | None = None) -> Path:
    """Return the path at which OSWorld's cache stores the copy of a URL that a setup step of a task downloads.

    Args:
        task_id: id of the task.
        url: address of the file.
        name: name of the file in the guest; None: the name in the URL.
    """
    return asset_dir() / task_id / f"{url_key(url)}_{name or PurePosixPath(urlsplit(url).path).name}"
