"""Missing system packages are reported with the command that installs them."""

from pathlib import Path

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("bare_machine")
def test_missing_programs_are_reported_by_their_debian_packages() -> None:
    assert {"bubblewrap", "xvfb", "openbox", "dbus", "mousepad"} <= set(missing_packages())
    assert "mousepad" not in missing_packages(applications=False)
    assert set(missing_packages(whole_suite=True)) - set(missing_packages()) == {"gnumeric", "gpicview", "mupdf"}


@pytest.mark.usefixtures("bare_machine")
def test_a_desktop_with_missing_packages_is_rejected_with_the_command_that_installs_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get install .*bubblewrap.*xvfb"):
        make_desktop(DesktopConfig(), "desktop", tmp_path)


def test_a_run_root_that_is_too_long_for_a_socket_path_is_rejected(tmp_path: Path) -> None:
    if missing_packages(applications=False):
        pytest.skip("the packages of the embedded desktop are not installed")
    with pytest.raises(UserError, match="too long"):
        make_desktop(DesktopConfig(), "desktop", tmp_path / ("x" * 100))
