"""Small private disk for one process, which can be filled and slowed down.

The disk is a tmpfs in a mount namespace of its own, so it is visible only to processes that are started in the
namespace, and disappears with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

_SIZE = "192m"
_SLOW_CALLS = "fdatasync,fsync,pwrite64"
_BALLAST_BYTES = 1024**2


def disk_unavailable_reason() -> str:
    """Return why no private disk can be mounted on this machine; empty if one can."""
    if any(shutil.which(name) is None for name in ("unshare", "nsenter")):
        return "util-linux is not installed"
    status = subprocess.run([*_unshare(), "true"], capture_output=True).returncode
    return "mount namespaces are not permitted on this machine" if status else ""


class Disk:
    """Disk mounted at a folder, visible to processes whose command starts with `prefix`.

    Args:
        folder: mount point.
    """

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        """Held while the disk is full or files on it are changed."""
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        # The first process in the namespace keeps the disk mounted while the processes that use it are killed.
        script = f'mount -t tmpfs -o size={_SIZE},mode=0777 tmpfs "{self._folder}" && echo up && exec cat'
        # Its `cat` reads a pipe from this process, so it exits with this process, however that ends.
        self._keeper = subprocess.Popen(
            [*_unshare(), "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"up\n":
            raise RuntimeError(f"no disk could be mounted at {self._folder}")

    @property
    def prefix(self) -> list[str]:
        """Command prefix that runs a command in the namespace of the disk."""
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self._keeper.pid), "--mount", *user, "--"]

    @property
    def path(self) -> Path:
        """Path of the files of the disk outside of the namespace."""
        return Path(f"/proc/{self._keeper.pid}/root{self._folder}")

    def fill(self) -> None:
        """Fill the disk completely."""
        with suppress(OSError), open(self.path / "ballast", "ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(_BALLAST_BYTES))

    def free(self) -> None:
        """Free the space that `fill` used."""
        (self.path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount the disk and discard its files."""
        self._keeper.terminate()
        self._keeper.wait()


def _unshare() -> list[str]:
    return ["unshare", *([] if os.getuid() == 0 else ["--map-root-user", "--user"]), "--mount"]


class SlowCalls:
    """Delays the write and sync calls of a process until it is closed.

    Args:
        pid: id of the process.
        delay_s: delay of each call in seconds.
    """

    def __init__(self, pid: int, delay_s: float) -> None:
        inject = f"inject={_SLOW_CALLS}:delay_enter={round(1e6 * delay_s)}"
        command = ["strace", "-f", "-q", "-p", str(pid), "-e", f"trace={_SLOW_CALLS}", "-e", inject, "-o", "/dev/null"]
        self._tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Detach from the process; by SIGKILL, as strace would wait for threads that have been killed meanwhile."""
        self._tracer.kill()
        self._tracer.wait()
