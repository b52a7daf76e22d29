"""Landlock domains: keep a program and its descendants from the memory and descriptors of other programs.

All programs of a session have the same user, so that each could write to `/proc/PID/mem` of every other one. A process
in a Landlock domain may access only processes in the same domain or in one created from it
(https://docs.kernel.org/userspace-api/landlock.html, section "Ptrace restrictions").
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on all machine types
_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_ACCESS_REFER = 1 << 13
"""Right to move files between folders. A domain needs one right that it restricts, and restricts this one anyway."""
_FIRST_VERSION_WITH_REFER = 2  # Linux 5.19
_PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)


def is_available() -> bool:
    """Return whether this process may create domains: the kernel is Linux 5.19 or later, and no filter forbids it."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, _RULESET_VERSION)
    return version >= _FIRST_VERSION_WITH_REFER


def enter_new_domain() -> bool:
    """Put this process, which must have one thread, and its future descendants into a domain of their own.

    Files can be accessed as before.

    Returns:
        Whether the process is in a new domain; False if domains are not available.
    """
    if not is_available():
        return False
    attributes = struct.pack("=Q", _ACCESS_REFER)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        rule = struct.pack("=Qi", _ACCESS_REFER, root)
        if _libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) != 0:
            return False
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return bool(_libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(root)
        os.close(ruleset)
