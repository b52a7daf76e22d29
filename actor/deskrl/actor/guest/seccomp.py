"""Seccomp filter for system calls that namespaces do not cover.

Rejected are sockets of the family AF_VSOCK (a virtual machine can reach its host through them regardless of its network
namespace), io_uring (which could create sockets unseen by filters), system calls of other architectures, calls that
reach into other processes (the kernel checks their user, which all processes of a desktop share), the kernel's keyrings
(which belong to users, not namespaces), and further interfaces that no desktop application needs. All other calls pass:
they are restricted by the namespaces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

_AF_VSOCK = 40
_IO_URING_SETUP = 425
_PIDFD_GETFD = 438
_X32_BIT = 0x40000000
"""Bit that marks system call numbers of the x32 ABI of x86-64."""


class _Machine(NamedTuple):
    """Numbers of one machine type: its audit architecture and its system calls."""

    architecture: int
    socket: int
    forbidden: dict[str, int]
    """System calls that fail with EPERM."""


_MACHINES = {
    "x86_64": _Machine(
        0xC000003E,
        41,
        {
            "ptrace": 101,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "perf_event_open": 298,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "bpf": 321,
            "userfaultfd": 323,
            "pidfd_getfd": _PIDFD_GETFD,
        },
    ),
    "aarch64": _Machine(
        0xC00000B7,
        198,
        {
            "ptrace": 117,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "bpf": 280,
            "userfaultfd": 282,
            "pidfd_getfd": _PIDFD_GETFD,
        },
    ),
}
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`, the input of the filter."""
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_PASS, _FAIL = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    """`struct sock_fprog` of the kernel."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def install_seccomp_filter() -> None:
    """Install the filter for this process and its future descendants. It cannot be removed.

    Nothing is filtered on machine types whose system call numbers are not listed here.

    Raises:
        OSError: the kernel rejects the filter.
    """
    if (machine := os.uname().machine) not in _MACHINES:
        return
    instructions = _instructions(_MACHINES[machine])
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if ctypes.CDLL(None, use_errno=True).prctl(*arguments, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot install the seccomp filter: {os.strerror(ctypes.get_errno())}")


def _instructions(machine: _Machine) -> list[tuple[int, int, int, int]]:
    """Return the filter in classic BPF: (operation, instructions to skip if true, if false, operand)."""
    # The program ends with: socket's family, then one return instruction per outcome.
    tail = [
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_EQUAL, 1, 0, _AF_VSOCK),
        (_RETURN, 0, 0, _PASS),
        (_RETURN, 0, 0, _FAIL | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    ]
    check_socket, no_permission, no_call = 0, 4, 5  # positions in `tail`
    tests = [(_IF_AT_LEAST, _X32_BIT, no_call), (_IF_EQUAL, _IO_URING_SETUP, no_call)]
    tests += [(_IF_EQUAL, number, no_permission) for number in machine.forbidden.values()]
    tests += [(_IF_EQUAL, machine.socket, check_socket)]
    num_tests = len(tests)
    head = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, machine.architecture),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    # After the tests comes one instruction that passes the call; a jump to `tail` skips it and the remaining tests.
    body = [
        (operation, num_tests - index + target, 0, operand) for index, (operation, operand, target) in enumerate(tests)
    ]
    return [*head, *body, (_RETURN, 0, 0, _PASS), *tail]
