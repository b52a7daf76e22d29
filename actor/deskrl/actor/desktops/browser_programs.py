"""Browser programs that run inside a desktop's sandbox, and what to do if none is installed."""

from __future__ import annotations

from pathlib import Path

from deskrl.core.errors import UserError

# Also in deploy/platform_support.sh, which runs before deskrl is installed.
BROWSER_PROGRAMS = (
    Path("/usr/lib/chromium/chromium"),
    Path("/usr/lib/chromium-browser/chromium-browser"),
    Path("/opt/google/chrome/chrome"),
)
"""Programs of Debian's chromium, of packages named chromium-browser, and of Google Chrome."""
_SNAP = Path("/snap/bin/chromium")


def find_browser(root: Path = Path("/")) -> Path | None:
    """Return the browser program that desktops use; None if there is none.

    Args:
        root: directory that contains the file system of the machine.
    """
    return next((program for program in BROWSER_PROGRAMS if (root / program.relative_to("/")).is_file()), None)


def check_browser(root: Path = Path("/")) -> None:
    """Raise UserError if no browser is installed that runs inside a sandbox.

    Args:
        root: directory that contains the file system of the machine.
    """
    if find_browser(root) is not None:
        return
    if (root / _SNAP.relative_to("/")).exists() or _is_ubuntu(root):
        raise UserError(
            "no browser that runs in a sandbox is installed; on Ubuntu, chromium is a snap, which does not",
            "install google-chrome-stable from Google's package (https://www.google.com/chrome)",
        )
    raise UserError("no browser is installed", "apt-get install chromium")


def _is_ubuntu(root: Path) -> bool:
    """Return whether the machine runs Ubuntu or a distribution that is based on it."""
    try:
        lines = (root / "etc/os-release").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    names = f"{values.get('ID', '')} {values.get('ID_LIKE', '')}".replace('"', "").split()
    return "ubuntu" in names
