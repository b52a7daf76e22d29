"""Users of this machine for desktops: each desktop runs as a user of its own where this process may give one away.

The kernel counts some resources per user and not per namespace: inotify instances, pending signals, locked memory,
buffers of pipes. Desktops with the same user could therefore starve one another. Root may use any user. An ordinary
user may use its subordinate ids (`/etc/subuid`, `/etc/subgid`) inside a user namespace that `newuidmap` and `newgidmap`
map to them.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.guest_locks import try_acquire
from deskrl.core.errors import UserError

_ROOT_RANGE = range(60706, 61184)
"""Range that systemd leaves unused (https://systemd.io/UIDS-GIDS). The users have no account."""
_LOCK_FOLDERS = (Path("/run"), Path("/tmp"))
_SUBORDINATE_USERS, _SUBORDINATE_GROUPS = Path("/etc/subuid"), Path("/etc/subgid")
_MAPPED_ID = 1000
"""Id of a subordinate user in the user namespace that maps it; root there is the user of this process."""
_INOTIFY_LIMITS = ("max_inotify_instances", "max_inotify_watches")
_NUM_QUOTAS = 4
"""A desktop gets this fraction of the user's inotify limits: the kernel counts subordinate users to their owner too."""
_TRIAL_TIMEOUT_S = 10.0

_search_starts = itertools.count(os.getpid())


@dataclass(frozen=True)
class UserRange:
    """Users that this process may give to desktops."""

    user_ids: range
    group_ids: range
    """Groups, one per user."""
    is_subordinate: bool
    """Whether they can be used in a user namespace only."""


ROOT_USERS = UserRange(_ROOT_RANGE, _ROOT_RANGE, is_subordinate=False)


class KernelUser:
    """User that serves one desktop of this machine at a time, across processes, until `release` is called."""

    def __init__(self, user_id: int, group_id: int, *, is_subordinate: bool, lock: IO[bytes]) -> None:
        self.user_id = user_id
        """Id in the user namespace of this process."""
        self._group_id = group_id
        self._is_subordinate = is_subordinate
        self._lock = lock

    @classmethod
    def acquire(cls, users: UserRange = ROOT_USERS) -> KernelUser:
        """Acquire a user that no other desktop has.

        Raises:
            DesktopError: all users of the range serve other desktops.
        """
        folder = _lock_folder()
        num_users = len(users.user_ids)
        start = next(_search_starts)
        for offset in range(num_users):
            index = (start + offset) % num_users
            if (lock := try_acquire(folder / str(users.user_ids[index]))) is not None:
                return cls(
                    users.user_ids[index], users.group_ids[index], is_subordinate=users.is_subordinate, lock=lock
                )
        raise DesktopError(f"all {num_users} users for desktops are in use on this machine")

    def release(self) -> None:
        """Let another desktop have the user."""
        self._lock.close()

    def command(self, script: list[str], program: list[str]) -> list[str]:
        """Return the command line that runs a program as this user in a mount namespace of its own.

        Args:
            script: shell commands that run before it in the mount namespace, with the permission to mount.
            program: command line of the program.
        """
        namespaces, ids = ["--mount"], (self.user_id, self._group_id)
        if self._is_subordinate:
            # The order of the numbers is that of util-linux 2.38, which later versions understand as well.
            mapped = [f"{number},{_MAPPED_ID},1" for number in ids]
            namespaces += ["--user", "--map-root-user", "--map-users", mapped[0], "--map-groups", mapped[1]]
            script = [*script, *_quota_script()]
            ids = (_MAPPED_ID, _MAPPED_ID)
        change = ["setpriv", f"--reuid={ids[0]}", f"--regid={ids[1]}", "--clear-groups"]
        shell = ["sh", "-c", " && ".join([*script, f'exec {shlex.join(change)} "$@"']), "deskrl-desktop"]
        return ["unshare", *namespaces, *shell, *program]


@cache
def own_users() -> UserRange | None:
    """Return the users that this process may give to desktops; None if desktops share its own user."""
    try:
        return find_own_users()
    except UserError:
        return None


def find_own_users() -> UserRange:
    """Return the users that this process may give to desktops.

    Raises:
        UserError: it may not give any, for the reason in the message.
    """
    if os.geteuid() == 0:
        return ROOT_USERS
    if missing := [name for name in ("newuidmap", "newgidmap", "unshare", "setpriv") if shutil.which(name) is None]:
        raise UserError(f"{', '.join(missing)} not found", "apt-get install uidmap util-linux")
    user_ids, group_ids = map(_subordinate_ids, (_SUBORDINATE_USERS, _SUBORDINATE_GROUPS))
    num_users = min(len(user_ids), len(group_ids), len(_ROOT_RANGE))
    if num_users == 0:
        raise UserError(
            f"this user has no range in {_SUBORDINATE_USERS} and {_SUBORDINATE_GROUPS}",
            "as root: usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST USER, with unused ids",
        )
    # Containers of this user without a daemon use the beginning of the range first.
    users = UserRange(user_ids[-num_users:], group_ids[-num_users:], is_subordinate=True)
    _try_first(users)
    return users


def _try_first(users: UserRange) -> None:
    try:
        user = KernelUser.acquire(users)
        command = user.command(["mount -t tmpfs -o size=1M deskrl /mnt"], ["true"])
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=True)
        finally:
            user.release()
    except (OSError, DesktopError, subprocess.SubprocessError) as error:
        printed = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise UserError(
            f"subordinate users cannot be used ({' '.join(printed.split())})",
            "install util-linux 2.38 or later, and permit user namespaces to the program unshare",
        ) from error


def _subordinate_ids(path: Path) -> range:
    """Return the largest range of this process's user in `/etc/subuid` or `/etc/subgid`; empty if it has none."""
    owners = {str(os.geteuid())}
    try:
        owners.add(pwd.getpwuid(os.geteuid()).pw_name)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (KeyError, OSError, UnicodeDecodeError):  # newuidmap requires an account
        return range(0)
    entries = [line.split(":") for line in lines]
    ranges = [range(int(e[1]), int(e[1]) + int(e[2])) for e in entries if len(e) == 3 and e[0] in owners]
    return max(ranges, key=len, default=range(0))


def _quota_script() -> list[str]:
    """Return shell commands that limit what the kernel counts to the owner of the user namespace."""
    quotas = {}
    for name in _INOTIFY_LIMITS:
        limit = int(Path("/proc/sys/fs/inotify", name.replace("inotify", "user")).read_text())
        quotas[name] = max(limit // _NUM_QUOTAS, 1)
    return [f"echo {quota} > /proc/sys/user/{name}" for name, quota in quotas.items()]


def _lock_folder() -> Path:
    parent = next(folder for folder in _LOCK_FOLDERS if os.access(folder, os.W_OK))
    folder = parent / f"deskrl-desktop-users-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
