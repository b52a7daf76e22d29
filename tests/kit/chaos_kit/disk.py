"""A small disk of its own for one process, that can be filled and made slow. Knows mounts, and how strace delays calls.

The disk is memory, mounted where only the processes that were started on it see it: nothing of it is left afterwards.
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


def why_no_disk() -> str:
    """Why there is no small disk on this machine; empty if there can be."""
    if any(shutil.which(name) is None for name in ("unshare", "nsenter")):
        return "util-linux is not installed"
    refused = subprocess.run([*_unshare(), "true"], capture_output=True).returncode
    return "this machine grants no mount namespace" if refused else ""


class Disk:
    """Mounted at a folder, for those whose commands begin with `prefix`.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        """Held by who fills it, or changes files on it."""
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        # The first process in the namespace keeps it, and what is on the disk, when those that use it are killed.
        script = f'mount -t tmpfs -o size={_SIZE},mode=0777 tmpfs "{self._folder}" && echo up && exec cat'
        # It reads until this process is gone, however it ends.
        self._keeper = subprocess.Popen(
            [*_unshare(), "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"up\n":
            raise RuntimeError(f"no disk could be mounted at {self._folder}")

    @property
    def prefix(self) -> list[str]:
        """What a command begins with to run on the disk."""
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self._keeper.pid), "--mount", *user, "--"]

    @property
    def path(self) -> Path:
        """Where the disk's files are found from outside."""
        return Path(f"/proc/{self._keeper.pid}/root{self._folder}")

    def fill(self) -> None:
        """Leave no byte free."""
        with suppress(OSError), open(self.path / "ballast", "ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(_BALLAST_BYTES))

    def free(self) -> None:
        """Give the space back."""
        (self.path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it, and of all that is on it."""
        self._keeper.terminate()
        self._keeper.wait()


def _unshare() -> list[str]:
    return ["unshare", *([] if os.getuid() == 0 else ["--map-root-user", "--user"]), "--mount"]


class SlowCalls:
    """Delays what a process writes and forces to disk, for as long as this is open.

    Args:
        pid: of the process.
        delay_s: of each call.
    """

    def __init__(self, pid: int, delay_s: float) -> None:
        inject = f"inject={_SLOW_CALLS}:delay_enter={round(1e6 * delay_s)}"
        command = ["strace", "-f", "-q", "-p", str(pid), "-e", f"trace={_SLOW_CALLS}", "-e", inject, "-o", "/dev/null"]
        self._tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Let the process go. The kernel sees to it: strace would wait for threads that were killed meanwhile."""
        self._tracer.kill()
        self._tracer.wait()
