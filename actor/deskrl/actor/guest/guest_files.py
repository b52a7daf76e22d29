"""Files of the session, opened from outside of it without following links out of its root.

The policy may have replaced any file or folder of the home by a link, a FIFO, a device or a file that grows. Paths are
therefore resolved by the kernel below the root of the session (openat2, Linux 5.6), and only regular files are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

from deskrl.actor.guest.credentials import acting_as

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_MAX_TREE_ENTRIES, _MAX_TREE_DEPTH = 100_000, 100
_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """`struct open_how` of the kernel."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class GuestFiles:
    """Files below the root of the session.

    Args:
        root_fd: descriptor of the root folder of the session.
        max_file_bytes: size limit of files that are read.
        user_id: user whose permissions apply; None: those of this process. Requires CAP_SETUID.
    """

    def __init__(self, root_fd: int, max_file_bytes: int, user_id: int | None) -> None:
        self._root_fd = root_fd
        self._max_file_bytes = max_file_bytes
        self._user_id = user_id
        # A link to a file of /proc must not be read: for example the memory of a process. The folder is a mount.
        self._proc_device = os.stat("proc", dir_fd=root_fd).st_dev

    def read(self, path: str) -> bytes:
        """Return a regular file.

        Raises:
            FileNotFoundError: it does not exist, is not readable, is not a regular file, or exceeds the size limit.
        """
        # A file with a lease would block; O_NONBLOCK makes opening it fail instead, and does not wait for FIFOs.
        with self._opened(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as descriptor:
            status = os.fstat(descriptor)
            is_regular = stat.S_ISREG(status.st_mode) and status.st_dev != self._proc_device
            if not is_regular or status.st_size > self._max_file_bytes:
                raise FileNotFoundError(errno.ENOENT, "not a regular file within the size limit", path)
            data = bytearray()
            while piece := os.read(descriptor, self._max_file_bytes + 1 - len(data)):
                data += piece
                if len(data) > self._max_file_bytes:
                    raise FileNotFoundError(errno.ENOENT, "the file exceeds the size limit", path)
            return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        """Write a file and create its parent folders; raises OSError."""
        self.make_folders(os.path.dirname(path))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY
        with acting_as(self._user_id):
            descriptor = self._open(path, flags, 0o644)
        with open(descriptor, "wb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            file.write(data)

    def exists(self, path: str) -> bool:
        """Return whether a path exists."""
        try:
            with self._opened(path, os.O_PATH):
                return True
        except FileNotFoundError:
            return False

    def is_folder(self, path: str) -> bool:
        """Return whether a path is a folder."""
        try:
            with self._opened(path, os.O_PATH) as descriptor:
                return stat.S_ISDIR(os.fstat(descriptor).st_mode)
        except FileNotFoundError:
            return False

    def tree(self, path: str) -> dict[str, Any]:
        """Return a folder and everything in it as in OSWorld's protocol, without following links.

        Raises:
            FileNotFoundError: the path is not a folder.
            OSError: the folder contains more than 100,000 entries. Folders nested deeper than 100 appear empty.
        """
        with self._opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor, acting_as(self._user_id):
            return _tree(descriptor, os.path.basename(path.rstrip("/")), [_MAX_TREE_ENTRIES], 0)

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        """Open an existing path; every failure is a FileNotFoundError."""
        try:
            with acting_as(self._user_id):
                descriptor = self._open(path, flags, 0)
        except OSError as error:
            raise FileNotFoundError(errno.ENOENT, str(error), path) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def make_folders(self, folder: str) -> None:
        """Create a folder and its parents where they do not exist; raises OSError."""
        made = "/"
        with acting_as(self._user_id):
            for name in filter(None, folder.split("/")):
                parent = self._open(made, os.O_PATH | os.O_DIRECTORY, 0)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=parent)
                os.close(parent)
                made = f"{made}{name}/"

    def _open(self, path: str, flags: int, mode: int) -> int:
        how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        arguments = (self._root_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if "\0" in path:
            raise OSError(errno.EINVAL, "the path contains a null character")
        for _ in range(100):  # EAGAIN: a rename elsewhere on the machine while `..` was resolved
            descriptor: int = _libc.syscall(_OPENAT2, *arguments)
            if descriptor >= 0 or ctypes.get_errno() != errno.EAGAIN:
                break
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        return descriptor


def _tree(folder_fd: int, name: str, budget: list[int], depth: int) -> dict[str, Any]:
    children: list[dict[str, Any]] = []
    with os.scandir(folder_fd) as entries:
        for entry in entries:
            budget[0] -= 1
            if budget[0] < 0:
                raise OSError(errno.E2BIG, f"more than {_MAX_TREE_ENTRIES} entries")
            if not entry.is_dir(follow_symlinks=False):
                children.append({"type": "file", "name": entry.name})
                continue
            try:
                if depth == _MAX_TREE_DEPTH:
                    raise OSError(errno.ELOOP, "nested too deeply")
                child_fd = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder_fd)
            except OSError:  # it is not readable, or was replaced meanwhile
                children.append({"type": "directory", "name": entry.name, "children": []})
                continue
            try:
                children.append(_tree(child_fd, entry.name, budget, depth + 1))
            finally:
                os.close(child_fd)
    return {"type": "directory", "name": name, "children": sorted(children, key=lambda child: str(child["name"]))}
