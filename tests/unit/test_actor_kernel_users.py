"""Kernel users of desktops: each serves one desktop at a time, and a machine that gives none says why."""

import os
import shutil

import pytest

from deskrl.actor.desktops.kernel_users import KernelUser, UserRange, find_own_users
from deskrl.core.errors import UserError

USERS = UserRange(range(70_000_000, 70_000_005), range(80_000_000, 80_000_005), is_subordinate=True)


def test_a_user_serves_one_desktop_at_a_time() -> None:
    users = [KernelUser.acquire(USERS) for _ in range(4)]
    assert len({user.user_id for user in users}) == 4
    for user in users:
        user.release()


def test_a_subordinate_user_is_mapped_in_a_user_namespace() -> None:
    user = KernelUser.acquire(USERS)
    command = user.command(["echo mounted"], ["program"])
    assert command[command.index("--map-users") + 1] == f"{user.user_id},1000,1"
    assert command[command.index("--map-groups") + 1] == f"{user.user_id + 10_000_000},1000,1"
    assert command[-1] == "program"
    user.release()


@pytest.mark.parametrize(
    ("is_installed", "message", "hint"),
    [(False, "newuidmap, newgidmap", "apt-get install uidmap"), (True, "no range in /etc/subuid", "usermod")],
)
def test_a_machine_without_subordinate_users_says_why(
    monkeypatch: pytest.MonkeyPatch, is_installed: bool, message: str, hint: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)  # a user without an account
    monkeypatch.setattr(shutil, "which", lambda name: name if is_installed or not name.startswith("new") else None)
    with pytest.raises(UserError, match=message) as raised:
        find_own_users()
    assert hint in raised.value.hint
