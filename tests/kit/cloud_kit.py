"""Cloud without an account, and an environment in which desktop-env's providers use it (cloud_doubles/)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Self

import pytest

from deskrl.actor.desktops import desktop_env_machine

KIT = Path(__file__).parent
DOUBLES = KIT / "cloud_doubles"
sys.path.append(str(DOUBLES))

import cloud_machines  # noqa: E402 - of the folder above


class Cloud:
    """Folder with the machines of a cloud, which end with the block.

    Args:
        folder: folder of the machines.
        monkeypatch: sets the environment variables of the doubles.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.run_root = folder / "run" / "desktops"
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("FAKE_CLOUD_DIR", str(folder))
        monkeypatch.setenv("PATH", f"{DOUBLES}:{os.environ['PATH']}")
        self.use_modules(DOUBLES)
        desktop_env_machine._check_provider.cache_clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.running():
            cloud_machines.remove(name)

    def use_modules(self, *folders: Path) -> None:
        """Let machine processes import modules from these folders, before all others."""
        self._monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))

    def use_double_of_desktop_env(self) -> None:
        """Replace the evaluators' environment by one with the double of desktop-env."""
        environment = self.folder / "evaluators"
        (environment / "bin").mkdir(parents=True)
        (environment / "bin" / "python").symlink_to(sys.executable)
        self._monkeypatch.setenv("DESKRL_EVALUATORS", str(environment))
        self.use_modules(KIT / "desktop_env_double", DOUBLES)

    def add_machine(self, name: str) -> str:
        """Create a machine with the snapshot `init_state` that is off; return the path of its .vbox file."""
        (self.folder / f"{name}.vmx").write_text(json.dumps(cloud_machines.description("init_state")))
        file = self.folder / f"{name}.vbox"
        file.write_text(f'<VirtualBox xmlns="http://www.virtualbox.org/"><Machine uuid="{{{name}}}"/></VirtualBox>')
        return str(file)

    def calls(self) -> list[str]:
        """Return what was done to machines."""
        file = self.folder / "calls.txt"
        return file.read_text().splitlines() if file.exists() else []

    def running(self) -> list[str]:
        """Return the names of running machines."""
        return cloud_machines.running()

    def lock_files(self, provider: str) -> list[Path]:
        """Return the lock files of a provider's machines that name the run."""
        folder = Path(os.environ["DESKRL_EVALUATORS"]) / "machines" / provider
        return [file for file in sorted(folder.glob("*.json")) if str(self.run_root) in file.read_text()]
