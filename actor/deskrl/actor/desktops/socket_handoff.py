"""Passes a listening Unix socket into a container without network (SCM_RIGHTS).

This process listens on the guest server's socket and passes the listening socket to the guest through a second socket,
the handoff socket, which is mounted into the container. The guest connects to it once, then it is closed. The guest
therefore needs no network interface and no port, cannot write to files of this machine, and is unreachable for other
desktops.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.orphan_cleanup import OwnerRecord
from deskrl.core.socket_paths import check_socket_path

LONGEST_SOCKET_NAME = "handoff.sock"
"""Name of the longest path of a socket in the folder of a desktop."""


class SocketHandoff:
    """Sockets of one desktop, in a folder that `reap_orphans` removes if the actor is killed.

    Args:
        folder: folder of the desktop; created by `open` and removed by `remove`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._handoff: socket.socket | None = None
        self._listener: socket.socket | None = None
        check_socket_path(self.path)

    @property
    def guest_socket_path(self) -> Path:
        """Socket on which the guest server responds after the handoff."""
        return self._folder / "guest.sock"

    @property
    def path(self) -> Path:
        """Handoff socket, to be mounted into the container."""
        return self._folder / LONGEST_SOCKET_NAME

    def open(self) -> None:
        """Create both sockets, replacing existing ones."""
        self.remove()
        self._folder.mkdir(parents=True, mode=0o700)
        OwnerRecord.for_this_process(()).write(self._folder)
        self._listener, self._handoff = _listen(self.guest_socket_path), _listen(self.path)
        self._handoff.setblocking(False)
        self.path.chmod(0o666)  # the guest's user does not exist on this machine; the folder keeps other users away

    async def send_listener(self, timeout_s: float) -> None:
        """Wait for the guest, pass it the listening socket, and close both sockets here. Does nothing if already done.

        Raises:
            DesktopError: the guest did not connect within `timeout_s`; the call may be repeated.
        """
        if self._handoff is None or self._listener is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                guest, _ = await asyncio.get_running_loop().sock_accept(self._handoff)
        except TimeoutError as error:
            raise DesktopError("the guest server did not fetch its socket") from error
        with guest:
            socket.send_fds(guest, [b"\0"], [self._listener.fileno()])
        self.close()

    def close(self) -> None:
        """Close the sockets of this process. Only the guest keeps the listening socket open after the handoff."""
        for opened in (self._handoff, self._listener):
            if opened is not None:
                opened.close()
        self._handoff = self._listener = None

    def remove(self) -> None:
        """Close the sockets and remove the folder."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the parent still contains other desktops
            self._folder.parent.rmdir()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(bytes(path))
    listener.listen(64)
    return listener
