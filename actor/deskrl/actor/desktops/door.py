"""How a guest in a container gets the socket that it answers on, without a network. Knows no container and no protocol.

This process listens, and hands the listening socket itself over through a second socket, the door, which the container
sees as one file. The guest connects to it once; then the door is shut. So the guest needs no interface and no port, it
can write to nothing of this machine, and no other desktop can reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.orphans import Record
from deskrl.core.errors import UserError

_SOCKET_PATH_BYTES = 107


class Door:
    """The sockets of one desktop, in a folder that `orphans.py` clears away after an actor that was killed.

    Args:
        folder: of the desktop; made when the door is opened, removed by `remove`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._door: socket.socket | None = None
        self._listener: socket.socket | None = None
        refuse_long_path(self.socket_path)

    @property
    def socket_path(self) -> Path:
        """Where the guest answers once it has its socket."""
        return self._folder / "guest.sock"

    @property
    def path(self) -> Path:
        """The door, to be shown to the container."""
        return self._folder / "door.sock"

    def open(self) -> None:
        """Make both sockets, anew if there were any."""
        self.remove()
        self._folder.mkdir(parents=True, mode=0o700)
        Record.of_this_process(()).write(self._folder)
        self._listener, self._door = _listen(self.socket_path), _listen(self.path)
        self._door.setblocking(False)
        self.path.chmod(0o666)  # the guest's user is none of this machine's; the folder keeps all others away

    async def hand_over(self, timeout_s: float) -> None:
        """Give the guest its socket when it comes, and shut the door; nothing happens if it has it already.

        Raises:
            DesktopError: it did not come in time; it may be waited for again.
        """
        if self._door is None or self._listener is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                guest, _ = await asyncio.get_running_loop().sock_accept(self._door)
        except TimeoutError as error:
            raise DesktopError("the guest server did not come for its socket") from error
        with guest:
            socket.send_fds(guest, [b"\0"], [self._listener.fileno()])
        self.shut()

    def shut(self) -> None:
        """Let nobody through any more. Whether the guest still answers then depends on the guest alone."""
        for opened in (self._door, self._listener):
            if opened is not None:
                opened.close()
        self._door = self._listener = None

    def remove(self) -> None:
        """Leave nothing."""
        self.shut()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other desktops still live there
            self._folder.parent.rmdir()


def refuse_long_path(path: Path) -> None:
    """Raise UserError if no socket can have this name."""
    if len(bytes(path)) > _SOCKET_PATH_BYTES:
        raise UserError(f"{path}: too long for the name of a socket", "choose a shorter run_root")


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(bytes(path))
    listener.listen(64)
    return listener
