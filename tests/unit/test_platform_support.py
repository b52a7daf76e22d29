"""Decisions of the installer and of doctor on several distributions: which browser, and what forbids sandboxes.

The answers of apt-cache are shortened to the fields that matter. Those of Ubuntu follow the published packages; they
were not recorded on a machine with Ubuntu.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from deskrl.actor.desktops.browser_programs import BROWSER_PROGRAMS, check_browser, find_browser
from deskrl.core.errors import UserError

REPOSITORY = Path(__file__).parents[2]
DEBIAN_CHROMIUM = """\
Package: chromium
Version: 131.0.6778.85-1~deb12u1
Depends: libasound2 (>= 1.0.16), libatomic1 (>= 4.8), chromium-common (= 131.0.6778.85-1~deb12u1)
Description-en: web browser
"""
SNAP_2204 = """\
Package: chromium-browser
Version: 1:85.0.4183.83-0ubuntu2.22.04.1
Pre-Depends: debconf, snapd
Depends: debconf (>= 0.5) | debconf-2.0
Description-en: Transitional package - chromium-browser -> chromium snap
"""
SNAP_2404 = """\
Package: chromium-browser
Version: 2:1snap1-0ubuntu2
Pre-Depends: debconf, snapd (>= 2.54)
Description-en: Transitional package - chromium-browser -> chromium snap
"""
SNAP_WITHOUT_TEXT = """\
Package: chromium
Version: 2:1-0ubuntu1
Depends: snapd
"""
GOOGLE_CHROME = """\
Package: google-chrome-stable
Version: 131.0.6778.108-1
Depends: ca-certificates, fonts-liberation, libasound2 (>= 1.0.17), xdg-utils (>= 1.0.2)
Description: The web browser from Google
"""
BACKPORT = (
    SNAP_2204.replace("1:85.0.4183.83-0ubuntu2.22.04.1", "1:131.0-0ppa1")
    .replace("Pre-Depends: debconf, snapd\n", "")
    .replace("Transitional package - chromium-browser -> chromium snap", "Chromium web browser")
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Return the root of a machine without a browser, and without kernel settings."""
    root = tmp_path / "root"
    root.mkdir()
    return root


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def ask(root: Path, call: str, offered: Sequence[str] = ()) -> tuple[int, str]:
    """Call a function of platform_support.sh on a machine where apt offers packages; return its status and output."""
    programs = root.parent / "bin"
    programs.mkdir(exist_ok=True)
    answers = "".join(f"{text.split()[1]}) cat <<'END'\n{text}END\n;;\n" for text in offered)
    (programs / "apt-cache").write_text(f'#!/bin/bash\ncase "${{@: -1}}" in\n{answers}*) exit 100 ;;\nesac\n')
    (programs / "apt-cache").chmod(0o755)
    script = f"set -euo pipefail; source {REPOSITORY}/deploy/platform_support.sh; {call}"
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "root": str(root)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("offered", "package"),
    [
        ([DEBIAN_CHROMIUM], "chromium"),
        ([SNAP_2204], None),
        ([SNAP_2404], None),
        ([SNAP_WITHOUT_TEXT], None),
        ([], None),
        ([SNAP_2204, GOOGLE_CHROME], "google-chrome-stable"),
        ([SNAP_WITHOUT_TEXT, SNAP_2404, GOOGLE_CHROME], "google-chrome-stable"),
        ([BACKPORT], "chromium-browser"),
    ],
)
def test_the_installer_chooses_a_browser_that_is_not_a_snap(
    machine: Path, offered: list[str], package: str | None
) -> None:
    status, output = ask(machine, "browser_package", offered)
    assert (status, output) == ((1, "") if package is None else (0, package))


@pytest.mark.parametrize("program", BROWSER_PROGRAMS)
def test_an_installed_browser_is_kept_and_used(machine: Path, program: Path) -> None:
    assert find_browser(machine) is None
    write(machine, str(program))
    assert ask(machine, "browser_package", [SNAP_2404]) == (0, "")
    assert find_browser(machine) == program
    check_browser(machine)


@pytest.mark.parametrize(
    ("os_release", "hint"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "apt-get install chromium"),
        ('ID=debian\nVERSION_ID="13"\n', "apt-get install chromium"),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="22.04"\n', "google-chrome-stable"),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n', "google-chrome-stable"),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.10"\n', "google-chrome-stable"),
        ('ID=pop\nID_LIKE="ubuntu debian"\n', "google-chrome-stable"),
        ("", "apt-get install chromium"),
    ],
)
def test_doctor_says_how_to_get_a_browser_on_each_distribution(machine: Path, os_release: str, hint: str) -> None:
    write(machine, "etc/os-release", os_release)
    with pytest.raises(UserError) as error:
        check_browser(machine)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("settings", "obstacle", "hint"),
    [
        ({}, "", ""),
        ({"kernel/apparmor_restrict_unprivileged_userns": "0", "user/max_user_namespaces": "63000"}, "", ""),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, "apparmor", "deploy/install.sh apparmor"),
        ({"kernel/unprivileged_userns_clone": "0"}, "clone", "kernel.unprivileged_userns_clone=1"),
        ({"kernel/unprivileged_userns_clone": "1"}, "", ""),
        ({"user/max_user_namespaces": "0"}, "max", "user.max_user_namespaces"),
    ],
)
def test_the_kernel_setting_that_forbids_sandboxes_is_named(
    machine: Path, settings: dict[str, str], obstacle: str, hint: str
) -> None:
    for name, value in settings.items():
        write(machine, f"proc/sys/{name}", f"{value}\n")
    assert ask(machine, "userns_obstacle") == (0, obstacle)
    assert hint in ask(machine, f"userns_hint '{obstacle}'")[1]


def test_the_installed_profile_removes_the_obstacle(machine: Path) -> None:
    write(machine, "proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    write(machine, "etc/apparmor.d/deskrl-bwrap", (REPOSITORY / "deploy/apparmor/deskrl-bwrap").read_text())
    assert ask(machine, "userns_obstacle") == (0, "")
    assert ask(machine, "conflicting_profile") == (0, "")


@pytest.mark.parametrize(
    ("name", "text", "conflicts"),
    [
        ("bwrap-userns-restrict", "profile bwrap /usr/bin/bwrap flags=(attach_disconnected) {\n}\n", True),
        ("bwrap", "/usr/bin/bwrap flags=(unconfined) {\n  userns,\n}\n", True),
        ("flatpak", "profile flatpak /usr/bin/flatpak flags=(unconfined) {\n  /usr/bin/bwrap px,\n}\n", False),
        ("notes", "# profile bwrap /usr/bin/bwrap {\n", False),
    ],
)
def test_another_profile_for_bwrap_is_found_unless_it_is_disabled(
    machine: Path, name: str, text: str, conflicts: bool
) -> None:
    write(machine, f"etc/apparmor.d/{name}", text)
    expected = f"/etc/apparmor.d/{name}" if conflicts else ""
    assert ask(machine, "conflicting_profile") == (0, expected)
    write(machine, f"etc/apparmor.d/disable/{name}")
    assert ask(machine, "conflicting_profile") == (0, "")


def test_the_installer_and_the_desktops_know_the_same_browsers(machine: Path) -> None:
    _, output = ask(machine, 'printf "%s\\n" "${browser_programs[@]}"')
    assert output.split() == [str(program) for program in BROWSER_PROGRAMS]
