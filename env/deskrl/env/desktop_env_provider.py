"""Provider of desktop-env whose virtual machines are deskrl's desktops.

desktop-env has no registry of providers. `use_deskrl_desktops` therefore replaces its factory, and `DesktopEnv` and all
else remain the package's own. This module imports nothing of deskrl, because the requirements of the two exclude one
another: each desktop is a process of deskrl's interpreter (`deskrl.env.guest_server`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import desktop_env.desktop_env
from desktop_env.providers.base import Provider, VMManager

PROVIDER_NAME = "docker"
"""Name that `DesktopEnv` gets: the provider whose machines are clean when they start and have ports of their own."""
_OTHER_PORTS = (9222, 8006, 8080)
"""Ports of Chromium, VNC and VLC, which deskrl's desktops do not have."""
_STOP_TIMEOUT_S = 30.0


def use_deskrl_desktops(config: Path | str | None = None, python: Path | str = sys.executable) -> None:
    """Let `DesktopEnv(provider_name="docker")` use deskrl's desktops from now on.

    Args:
        config: run configuration (TOML), of which the section `desktop` is used; None: embedded desktops.
        python: interpreter of the environment in which deskrl is installed.
    """
    command = [str(python), "-m", "deskrl.env.guest_server", *([] if config is None else [str(config)])]
    original = desktop_env.desktop_env.create_vm_manager_and_provider

    def create(provider_name: str, region: str, use_proxy: bool = False) -> tuple[Any, Any]:
        if provider_name != PROVIDER_NAME:
            manager_and_provider: tuple[Any, Any] = original(provider_name, region, use_proxy)
            return manager_and_provider
        return DeskrlManager(), DeskrlProvider(command)

    desktop_env.desktop_env.create_vm_manager_and_provider = create


class DeskrlManager(VMManager):  # type: ignore[misc]  # its package may not be installed
    """Names of desktops: their screen size, since every desktop is made anew."""

    def get_vm_path(self, screen_size: tuple[int, int] = (1280, 720), **_: Any) -> str:
        """Return the name of a desktop with this (width, height) in pixels."""
        return f"{screen_size[0]}x{screen_size[1]}"

    def initialize_registry(self, **_: Any) -> None:
        """Do nothing: there is no registry."""

    def add_vm(self, vm_path: str, *_: Any, **__: Any) -> None:
        """Do nothing: there is no registry."""

    def delete_vm(self, vm_path: str, *_: Any, **__: Any) -> None:
        """Do nothing: there is no registry."""

    def occupy_vm(self, vm_path: str, pid: int, *_: Any, **__: Any) -> None:
        """Do nothing: there is no registry."""

    def list_free_vms(self, **_: Any) -> list[str]:
        """Return an empty list."""
        return []

    def check_and_clean(self, **_: Any) -> None:
        """Do nothing: there is no registry."""


class DeskrlProvider(Provider):  # type: ignore[misc]  # as above
    """One desktop, in a process that ends with this one.

    Args:
        command: command that starts a guest server (see `deskrl.env.guest_server`).
    """

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__()
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def start_emulator(self, path_to_vm: str, headless: bool, os_type: str | None = None, *_: Any) -> None:
        """Start the desktop if it does not run; raises RuntimeError with the reason if it does not start."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [*self._command, "--size", path_to_vm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's: the desktop ends when its input is closed
        )
        self._read_reply()

    def get_ip_address(self, path_to_vm: str) -> str:
        """Return address and ports."""
        return ":".join(map(str, ("127.0.0.1", self._port, *_OTHER_PORTS)))

    def revert_to_snapshot(self, path_to_vm: str, snapshot_name: str) -> str:
        """Reset the desktop to its initial state; start it anew if it has ended."""
        if self._process is None or self._process.poll() is not None:
            self.start_emulator(path_to_vm, headless=True)
            return path_to_vm
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("reset\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError("deskrl's desktop has ended") from error
        self._read_reply()
        return path_to_vm

    def save_state(self, path_to_vm: str, snapshot_name: str) -> None:
        """Raise NotImplementedError: deskrl's desktops have one initial state."""
        raise NotImplementedError("deskrl's desktops have no snapshots")

    def stop_emulator(self, path_to_vm: str, *_: Any) -> None:
        """Remove the desktop."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _read_reply(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"it ended with exit status {self._process.wait()}"}
        if "error" in reply:
            self.stop_emulator("")
            raise RuntimeError(f"deskrl's desktop did not start: {reply['error']}")
        self._port = int(reply["port"])
