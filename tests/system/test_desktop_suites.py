"""Desktops of deskrl's own providers keep the contract of all providers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

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
