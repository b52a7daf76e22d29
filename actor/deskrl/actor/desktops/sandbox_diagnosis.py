"""Cause of a sandbox that does not start, found from bubblewrap's message and the settings of the kernel."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.errors import UserError

_KERNEL = Path("/proc/sys")
_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_FORBIDDEN = ("permission denied", "operation not permitted", "no permissions", "not allowed")
_MINIMUM = "0.7"
"""First version of bubblewrap with all options that the sandbox uses (`--size`)."""


@dataclass(frozen=True)
class SandboxSettings:
    """Settings of this machine on which sandboxes depend; None where the kernel does not have a setting."""

    bwrap_version: str
    """Output of `bwrap --version`; empty if bubblewrap is not installed."""
    unprivileged_userns_clone: int | None = None
    max_user_namespaces: int | None = None
    apparmor_restrict_unprivileged_userns: int | None = None
    is_container: bool = False


def read_settings() -> SandboxSettings:
    """Return the settings of this machine."""
    return SandboxSettings(
        _read_version(),
        _read_setting("kernel/unprivileged_userns_clone"),
        _read_setting("user/max_user_namespaces"),
        _read_setting("kernel/apparmor_restrict_unprivileged_userns"),
        any(mark.exists() for mark in _CONTAINER_MARKS),
    )


def diagnose(reason: str, settings: SandboxSettings) -> UserError | None:
    """Return the error for a sandbox that cannot start on this machine; None if the failure may be transient.

    Args:
        reason: what bubblewrap printed.
        settings: settings of this machine.
    """
    if not settings.bwrap_version:
        return UserError(f"bubblewrap (bwrap) is not installed ({reason})", "apt-get install bubblewrap")
    if re.search(r"unknown option|unrecognized option|invalid option", reason, re.IGNORECASE):
        return UserError(
            f"{settings.bwrap_version} is too old ({reason})", f"install bubblewrap {_MINIMUM} or a later version"
        )
    if "No space left on device" in reason:
        return UserError(
            f"the number of user namespaces of this machine is exhausted ({reason})",
            "raise the sysctl user.max_user_namespaces, or lower desktop.num_envs",
        )
    if any(words in reason.lower() for words in _FORBIDDEN):
        return UserError(
            f"this machine does not permit this user to create a sandbox ({reason})", namespace_hint(settings)
        )
    return None


def namespace_hint(settings: SandboxSettings) -> str:
    """Return what permits user namespaces on this machine: the setting that forbids them, if one is found."""
    if settings.unprivileged_userns_clone == 0:
        return "sysctl kernel.unprivileged_userns_clone=1"
    if settings.max_user_namespaces == 0:
        return "sysctl user.max_user_namespaces=10000"
    if settings.apparmor_restrict_unprivileged_userns:
        return (
            "install deskrl's AppArmor profile for bwrap, as root: bash deploy/install.sh apparmor; or permit user "
            "namespaces to all programs: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if settings.is_container:
        return "permit user namespaces by the seccomp and capability settings of this container"
    return "possibly a security module or the machine's own container settings forbid user namespaces to this user"


def _read_version() -> str:
    try:
        return subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read_setting(name: str) -> int | None:
    try:
        return int((_KERNEL / name).read_text())
    except (OSError, ValueError):
        return None
