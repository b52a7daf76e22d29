"""Replacement of the kernel's session keyring, which is inherited by child processes and not covered by namespaces."""

from __future__ import annotations

import ctypes
import os

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1


def join_new_keyring() -> None:
    """Replace the session keyring inherited from the process that started the sandbox by a new, empty one.

    Does nothing if the kernel has no keyrings or forbids the call, as Docker's seccomp profile does.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _JOIN_SESSION_KEYRING, None)
