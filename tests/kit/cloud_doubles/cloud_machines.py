"""Double of a cloud for machines without an account: its machines are minimal guest servers on loopback addresses.

The doubles of the clouds' packages beside this file, of `VBoxManage` and of desktop-env are based on it. They know only
what desktop-env calls, and were not compared with a cloud. FAKE_CLOUD_DIR is the folder of the machines: NAME.vmx and
NAME.pid as for `fake_vmrun`, and calls.txt.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import fake_vmrun


def folder() -> Path:
    return Path(os.environ["FAKE_CLOUD_DIR"])


def log(*words: object) -> None:
    """Append a call to calls.txt."""
    with open(folder() / "calls.txt", "a", encoding="utf-8") as calls:
        calls.write(" ".join(map(str, words)) + "\n")


def create(image: str) -> str:
    """Create and start a machine from an image; return its name."""
    name = next(f"m-{number}" for number in itertools.count(1) if _reserve(f"m-{number}"))
    _file(name).write_text(json.dumps(description(image)), encoding="utf-8")
    log("create", name, image)
    fake_vmrun.start(_file(name))
    return name


def _reserve(name: str) -> bool:
    """Return whether a name was never used before."""
    try:
        (folder() / f"{name}.used").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def description(*snapshots: str) -> dict[str, Any]:
    """Return the description of a machine whose guest listens on an address of its own."""
    address = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
    return {"address": address, "snapshots": snapshots, "tools": True}


def start(name: str) -> None:
    log("start", name)
    if not is_running(name):
        fake_vmrun.start(_file(name))


def stop(name: str) -> None:
    """Switch a machine off; its disk remains."""
    log("stop", name)
    if is_running(name):
        fake_vmrun.stop(_file(name))


def remove(name: str) -> None:
    """Switch a machine off and remove it."""
    log("remove", name)
    if is_running(name):
        fake_vmrun.stop(_file(name))
    _file(name).unlink(missing_ok=True)


def revert(name: str, snapshot: str) -> None:
    """Restore a snapshot in which the machine is off."""
    log("revert", name, snapshot)
    fake_vmrun.revert(_file(name), snapshot)


def address(name: str) -> str:
    return str(fake_vmrun.describe(_file(name))["address"])


def exists(name: str) -> bool:
    return _file(name).exists()


def is_running(name: str) -> bool:
    return fake_vmrun.pid_of(_file(name)) is not None


def running() -> list[str]:
    """Return the names of running machines."""
    return sorted(file.stem for file in folder().glob("*.pid"))


def _file(name: str) -> Path:
    return folder() / f"{name}.vmx"
