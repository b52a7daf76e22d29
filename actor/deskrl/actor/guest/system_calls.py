"""A filter of system calls for what no namespace parts. Knows the kernel's numbers for them; starts nothing.

A virtual machine talks to its host by sockets of the family AF_VSOCK, whichever network namespace they are made in.
So nothing in a desktop makes one: not by `socket`, not by io_uring, which filters do not see into, and not by the
system calls of another architecture. All else passes: what may be done is the namespaces' business.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_AF_VSOCK = 40
_IO_URING_SETUP = 425
_X32_BIT = 0x40000000
"""In the numbers of x86-64's other calling convention."""
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""By machine: how the kernel's audit names it, and the number of `socket`."""
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in what a filter is shown of a call."""
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_PASS, _FAIL = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]


def filter_system_calls() -> None:
    """Have this process, and all that will descend from it, make no call to the host; nothing takes that back.

    On a machine whose numbers are not known here nothing is filtered.

    Raises:
        OSError: the kernel refuses.
    """
    if (machine := platform.machine()) not in _MACHINES:
        return
    steps = _steps(*_MACHINES[machine])
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if ctypes.CDLL(None, use_errno=True).prctl(*arguments, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"system calls cannot be filtered: {os.strerror(ctypes.get_errno())}")


def _steps(architecture: int, socket: int) -> list[tuple[int, int, int, int]]:
    """Classic BPF: what to do, how many steps to leave out if it holds and if not, with which number."""
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 0, 6, architecture),  # else: no such call
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 4, 0, _X32_BIT),
        (_IF_EQUAL, 3, 0, _IO_URING_SETUP),
        (_IF_EQUAL, 0, 3, socket),  # else: pass
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_EQUAL, 2, 1, _AF_VSOCK),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        (_RETURN, 0, 0, _PASS),
        (_RETURN, 0, 0, _FAIL | errno.EAFNOSUPPORT),
    ]
