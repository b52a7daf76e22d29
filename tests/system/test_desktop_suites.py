"""Desktops of deskrl's own providers keep the contract of all providers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from openenv_kit import ACTIONS, OpenEnvServer
from ports_kit import free_port
from target_game import KEYS, TARGET_ID

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.testing.desktops import DesktopSuite


@pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")
class TestEmbedded(DesktopSuite):
    provider = "embedded"


class TestSimulated(DesktopSuite):
    provider = "simulated"
    settings: ClassVar[dict[str, Any]] = {"simulated": {"time_scale": 1e-9}}
    lacks: ClassVar[dict[str, str]] = {
        "commands": "a simulated desktop has only the program `simulated`",
        "files": "a simulated desktop has no files",
        "windows": "a simulated desktop has no windows",
    }


class TestGymnasium(DesktopSuite):
    provider = "gymnasium"
    options: ClassVar[dict[str, Any]] = {"id": TARGET_ID, "actions": KEYS}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def importable_kit(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "kit"))
            yield


class TestOpenEnv(DesktopSuite):
    provider = "openenv"
    port = free_port()
    options: ClassVar[dict[str, Any]] = {"address": f"http://127.0.0.1:{port}", "actions": ACTIONS}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls) -> Iterator[None]:
        server = OpenEnvServer(port=cls.port)
        server.start()
        yield
        server.stop()
