"""The session of one desktop: a fresh home, X server, message bus and window manager. Knows how they start, no routes.

Everything here lives and dies with the sandbox, so nothing is ever stopped.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

DISPLAY = ":0"
HOME = Path("/home/user")
RUNTIME = Path("/run/user/1000")
_FRAMEBUFFERS = Path("/run/framebuffer")
_SKELETON = Path(__file__).parent / "home"
_PROGRAMS = Path(__file__).parent / "bin"
_USER_FOLDERS = ("Desktop", "Documents", "Downloads", "Pictures")
_POLL_S = 0.005


@dataclass(frozen=True)
class Limits:
    """Limits of this session's processes; None where a control group of the host sees to it."""

    num_processes: int | None
    data_bytes: int | None


class Session:
    """What is started once, before the first request is answered."""

    def __init__(self, width: int, height: int, limits: Limits) -> None:
        self.environment = self._environment()
        self._limits = limits
        self._width, self._height = width, height
        self._x_ready, ready = os.pipe()
        self._set_limits()
        _FRAMEBUFFERS.mkdir(parents=True, exist_ok=True)
        RUNTIME.mkdir(mode=0o700, parents=True, exist_ok=True)
        Path("/tmp/.X11-unix").mkdir(mode=0o1777)
        screen = ["-screen", "0", f"{width}x{height}x24", "-fbdir", str(_FRAMEBUFFERS), "-displayfd", str(ready)]
        never = ["-nolisten", "tcp", "-noreset", "-ac", "-r", "-s", "0"]
        self._x_server = self._spawn(["Xvfb", DISPLAY, *screen, *never], pass_fds=(ready,))
        os.close(ready)
        bus = self.environment["DBUS_SESSION_BUS_ADDRESS"]
        self._spawn(["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={bus}"])
        shutil.copytree(_SKELETON, HOME, dirs_exist_ok=True)
        for folder in _USER_FOLDERS:
            (HOME / folder).mkdir()

    def wait_for_x_server(self) -> Path:
        """Wait until the X server answers; its framebuffer file. Raises RuntimeError if it ended instead."""
        with open(self._x_ready, "rb") as ready:
            if not ready.read():
                raise RuntimeError(f"Xvfb ended with status {self._x_server.wait()}")
        return _FRAMEBUFFERS / "Xvfb_screen0"

    def start_window_manager(self) -> None:
        """Start openbox; `Windows.manager_answers` says when it is up."""
        self._window_manager = self._spawn(["openbox"])

    def check_window_manager(self) -> None:
        """Sleep a little while openbox starts; raises RuntimeError if it ended instead."""
        if self._window_manager.poll() is not None:
            raise RuntimeError(f"openbox ended with status {self._window_manager.returncode}")
        time.sleep(_POLL_S)

    def _spawn(self, command: list[str], pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    def _set_limits(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self._limits.num_processes is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (self._limits.num_processes,) * 2)
        if self._limits.data_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (self._limits.data_bytes,) * 2)

    @staticmethod
    def _environment() -> dict[str, str]:
        """The environment of every program of the desktop."""
        return {
            "DISPLAY": DISPLAY,
            "HOME": str(HOME),
            "USER": "user",
            "LOGNAME": "user",
            "SHELL": "/bin/bash",
            "PATH": f"{_PROGRAMS}:/usr/local/bin:/usr/bin:/bin:/usr/games",
            "LANG": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(RUNTIME),
            "XDG_SESSION_TYPE": "x11",
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={RUNTIME}/bus",
            # Settings in a file of the home folder, and neither remote file systems nor an accessibility bus: each
            # would be a daemon that every first application starts and waits for.
            "GSETTINGS_BACKEND": "keyfile",
            "GIO_USE_VFS": "local",
            "NO_AT_BRIDGE": "1",
            "GTK_A11Y": "none",
        }
