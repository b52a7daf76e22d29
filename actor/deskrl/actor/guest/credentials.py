"""Permissions of another user for one thread: to access files and to send signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

_SETRESUID = {"x86_64": 117, "aarch64": 147}
_UNUSED_USER_ID = 65533
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def acting_as(user_id: int | None) -> Iterator[None]:
    """Use the file permissions of a user in this thread; None: the own ones. Requires CAP_SETUID and CAP_SETGID."""
    if user_id is None:
        yield
        return
    _libc.setfsgid(user_id)
    _libc.setfsuid(user_id)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def signal_user(user_id: int, number: signal.Signals) -> None:
    """Send a signal to all processes of a user at one moment; requires CAP_SETUID.

    The kernel sends signal -1 to the processes that this thread may signal. The thread therefore takes the user's id as
    its effective one. Its real id is that of no process and its saved id stays, so that the user cannot signal it.
    """
    identity = os.getresuid()
    # The function of libc would change all threads of this process.
    setresuid = _SETRESUID[os.uname().machine]
    if _libc.syscall(setresuid, _UNUSED_USER_ID, user_id, identity[2]):
        raise OSError(ctypes.get_errno(), "setresuid")
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)
    finally:
        _libc.syscall(setresuid, *identity)
