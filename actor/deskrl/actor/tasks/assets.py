"""Asset cache: local copies of the files that tasks download, by URL.

Layout of the directory `deskrl/assets` in the user's cache directory:

    objects/<sha256>            content, stored once even if several URLs serve it
    addresses/<uuid5>.json      {"url": ..., "sha256": ..., "num_bytes": ...}; the file name is the UUID5 of the URL
    <task id>/                  directories copied from a cache of OSWorld: <uuid5>_<name> for the files that setup
                                steps download, with the name in the guest, and <dest> for those of evaluators
    partial/                    incomplete downloads

Readers see a complete copy or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from deskrl.actor.task import Task
from deskrl.core.file_io import write_json

_CHUNK_BYTES = 1024**2


def asset_dir() -> Path:
    """Return the directory of the asset cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deskrl" / "assets"


def url_key(url: str) -> str:
    """Return the key that names files about a URL."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, url))


def cloud_file_names(task: Task) -> dict[str, str]:
    """Return the names, by URL, under which OSWorld's cache stores the files that a task's evaluator fetches.

    OSWorld stores what other getters read under names of the same directory. A name that two files share is left out,
    because the copy may be either.
    """
    copies: list[tuple[str, str]] = []
    names: list[str] = []
    for item in (item for check in task.evaluator.checks for item in check.items):
        paths, dests = (_as_list(item.parameters.get(key)) for key in ("path", "dest"))
        if item.type == "cloud_file":
            copies += zip(paths, dests, strict=False)
        names += [] if item.type == "cloud_file" else dests
    names += [name for _, name in dict.fromkeys(copies)]
    return {url: name for url, name in copies if names.count(name) == 1 and ".." not in PurePosixPath(name).parts}


def find_asset(task_id: str, url: str, copied_as: str | None = None) -> Path | None:
    """Return the local copy of a URL that a task uses; None if there is no complete copy.

    Args:
        task_id: id of the task.
        url: address of the file.
        copied_as: name of the copy in OSWorld's cache if an evaluator uses the file, see `cloud_file_names`.
    """
    fetched = find_fetched(url)
    if fetched is not None:
        return fetched
    copies = sorted((asset_dir() / task_id).glob(f"{url_key(url)}_*"))
    if copied_as:
        copies.append(asset_dir() / task_id / copied_as.lstrip("/"))
    return next((copy for copy in copies if copy.is_file()), None)


def find_fetched(url: str) -> Path | None:
    """Return the copy that was fetched from a URL; None if there is none or its size has changed since."""
    try:
        record = json.loads(_record_path(url).read_bytes())
        copy = _object_path(record["sha256"])
        return copy if copy.stat().st_size == record["num_bytes"] else None
    except FileNotFoundError:
        return None


def store_asset(url: str, file: Path) -> Path:
    """Move a file into the cache as the copy of a URL; return its new path."""
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(data.fileno())
    copy, record = _object_path(digest.hexdigest()), _record_path(url)
    for path in (copy, record):
        path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, copy)
    write_json(record, {"url": url, "sha256": digest.hexdigest(), "num_bytes": copy.stat().st_size})
    return copy


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [item for item in value or () if isinstance(item, str)]


def _object_path(sha256: str) -> Path:
    return asset_dir() / "objects" / sha256


def _record_path(url: str) -> Path:
    return asset_dir() / "addresses" / f"{url_key(url)}.json"
