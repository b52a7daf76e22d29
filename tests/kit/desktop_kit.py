"""Real desktops of any provider for the duration of a test, in a temporary folder."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deskrl.actor import guest
from deskrl.actor.desktops import docker_client
from deskrl.actor.desktops.account_files import account_files
from deskrl.actor.desktops.base import Address, Desktop, DesktopGone
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.docker import container_options
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.actor.desktops.kernel_users import KernelUser
from deskrl.actor.desktops.mounts import (
    GUEST_LIBRARY,
    chrome_arguments,
    guest_sources,
    python_arguments,
    top_level_arguments,
)
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.guest.session_sandbox import HOME, RUNTIME
from deskrl.core.config import DesktopConfig

DEADLINE_S = 60.0
SMALL_MEMORY_BYTES = 256 * 1024**2
SMALL_MAX_PROCESSES = 128
_IMAGE_FOLDERS = (
    *("/home", "/run", "/run/user", "/var", "/opt", "/opt/deskrl", "/opt/deskrl/chrome", "/opt/deskrl/lib"),
    *("/opt/deskrl/lib/deskrl", "/opt/deskrl/lib/deskrl/actor", "/opt/deskrl/python"),
)
"""Folders that every user may enter, as in the image of the provider `docker`."""


@pytest.fixture
def run_root() -> Iterator[Path]:
    """Folder of the desktops; its path is short because it contains Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        yield Path(folder) / "desktops"


class EmulatedContainerDesktop(GuestDesktop):
    """Desktop whose guest server runs as in a container of the provider `docker`, without a docker daemon.

    The guest server is root with the capabilities of the container, in namespaces of its own but in the user namespace
    of this machine; the programs of the desktop are another user. Requires root.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        super().__init__(config)
        self._folder = run_root / name
        self._user = KernelUser.acquire()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> Address:
        if self._process is None or self._process.poll() is not None:
            raise DesktopGone("the desktop is not running")
        return self._folder / "guest.sock"

    @property
    def can_observe_host(self) -> bool:
        return True

    async def start(self) -> None:
        self._folder.mkdir(parents=True)
        user_id = self._user.user_id
        for name, mode in (("home", 0o755), ("run", 0o700)):
            (self._folder / name).mkdir()
            (self._folder / name).chmod(mode)
            os.chown(self._folder / name, user_id, user_id)
        for name, text in account_files(user_id).items():
            (self._folder / name).write_text(text)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._folder / "guest.sock"))
            listener.listen(64)
            # The options of the container, except how the guest server gets its socket.
            (text,) = container_options(self._config, user_id, self._folder / "handoff.sock")["command"]
            options = json.loads(text) | {"listener": listener.fileno()}
            del options["handoff_socket"]
            program = ["/usr/bin/python3", "-s", "-B", "-m", guest.__name__, json.dumps(options)]
            self._process = _start_guest([*self._sandbox(), *program], listener)
        await self.check_health(self._config.start_timeout_s)

    def _sandbox(self) -> list[str]:
        arguments = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
        arguments += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            arguments += ["--cap-add", capability]
        arguments += ["--ro-bind", "/usr", "/usr", *top_level_arguments(), "--ro-bind", "/etc", "/etc", "--dev", "/dev"]
        arguments += ["--proc", "/proc", "--perms", "1777", "--tmpfs", "/tmp"]
        for folder in _IMAGE_FOLDERS:
            arguments += ["--perms", "0755", "--dir", folder]
        for name, target in (("home", HOME), ("run", RUNTIME)):
            arguments += ["--bind", str(self._folder / name), target]
        for name in account_files(self._user.user_id):
            arguments += ["--ro-bind", str(self._folder / name), f"/etc/{name}"]
        for source, target in guest_sources().items():
            arguments += ["--ro-bind", str(source), str(target)]
        arguments += [*chrome_arguments(), *python_arguments(), "--setenv", "PYTHONPATH", str(GUEST_LIBRARY)]
        return [*arguments, "--chdir", "/"]

    async def reset(self) -> None:
        self._end()
        await self.start()

    async def close(self) -> None:
        self._end()
        self._user.release()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _start_guest(command: list[str], listener: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, pass_fds=(listener.fileno(),), env={"PATH": "/usr/bin:/bin"})


@pytest.fixture(params=["embedded", "emulated-container", "docker"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Provider of the desktops of the test; "emulated-container" is an EmulatedContainerDesktop."""
    name = str(request.param)
    if name == "docker":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("docker_address"))
        request.addfinalizer(docker_client.connect.cache_clear)
        docker_client.connect.cache_clear()
        return name
    if missing := missing_packages():
        pytest.skip(f"packages missing: {missing}")
    if name == "emulated-container":
        if os.geteuid() != 0:
            pytest.skip("the emulation of a container requires root")
        monkeypatch.setattr("desktop_kit.make_desktop", EmulatedContainerDesktop)
    return name


@pytest.fixture
def config(provider: str) -> DesktopConfig:
    """Configuration of small desktops of the provider."""
    name = "embedded" if provider == "embedded" else "docker"
    limits = {"memory_bytes": SMALL_MEMORY_BYTES, "max_processes": SMALL_MAX_PROCESSES}
    return DesktopConfig(provider=name, width=640, height=480, **limits)


@asynccontextmanager
async def running_desktop(config: DesktopConfig, run_root: Path, name: str = "desktop") -> AsyncIterator[Desktop]:
    """Start a desktop and close it at the end of the block; raises TimeoutError if the block exceeds DEADLINE_S."""
    desktop = make_desktop(config, name, run_root)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await desktop.start()
            yield desktop
    finally:
        await desktop.close()
