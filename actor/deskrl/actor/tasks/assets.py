"""Local copies of what tasks download, found by address. Knows no network (`asset_fetch.py`) and no task but by its id.

The folder `deskrl/assets` in the user's cache folder holds

    objects/<sha256>            what addresses serve, once, whatever their number
    addresses/<uuid5>.json      {"url": …, "sha256": …, "num_bytes": …} for each address, whose uuid5 names the file
    <task id>/<uuid5>_<name>    what a cache of OSWorld's held, where its folders were copied here

and `partial/` while something is fetched. Whoever reads sees a whole copy or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from deskrl.core.runfolder import write_json

_CHUNK_BYTES = 1024**2


def asset_folder() -> Path:
    """Where the copies lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deskrl" / "assets"


def address_key(url: str) -> str:
    """What files about an address are called."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, url))


def osworld_path(task_id: str, url: str) -> Path:
    """Where OSWorld's own cache would have a copy for a task."""
    return asset_folder() / task_id / f"{address_key(url)}_{PurePosixPath(urlsplit(url).path).name}"


def find_asset(task_id: str, url: str) -> Path | None:
    """The local copy of what `url` serves, for a task that names it; None if there is none of the right size."""
    fetched = find_fetched(url)
    if fetched is not None:
        return fetched
    copied = osworld_path(task_id, url)
    return copied if copied.is_file() else None


def find_fetched(url: str) -> Path | None:
    """The copy that was fetched from `url`, unless it has lost bytes since."""
    try:
        record = json.loads(_record_path(url).read_bytes())
        copy = _object_path(record["sha256"])
        return copy if copy.stat().st_size == record["num_bytes"] else None
    except FileNotFoundError:
        return None


def keep(url: str, file: Path) -> Path:
    """Take a file, which goes from where it is, as the copy of what `url` serves; where it is now."""
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


def _object_path(sha256: str) -> Path:
    return asset_folder() / "objects" / sha256


def _record_path(url: str) -> Path:
    return asset_folder() / "addresses" / f"{address_key(url)}.json"
