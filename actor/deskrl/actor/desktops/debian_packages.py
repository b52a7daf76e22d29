"""Debian packages that embedded desktops require, and which of them are missing on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from deskrl.actor.desktops.browser_programs import find_browser

_PROGRAMS = {
    "bwrap": "bubblewrap",
    "dbus-daemon": "dbus",
    "openbox": "openbox",
    "perl": "perl-base",
    "setpriv": "util-linux",
    "Xvfb": "xvfb",
}
_APPLICATIONS = {
    "gimp": "gimp",
    "mousepad": "mousepad",
    "mtpaint": "mtpaint",
    "pcmanfm": "pcmanfm",
    "xterm": "xterm",
}
_FURTHER_APPLICATIONS = {"gnumeric": "gnumeric", "gpicview": "gpicview", "mupdf": "mupdf"}
"""Applications that only the complete suite requires: `deploy/install.sh suite` installs them."""

_FILES = {
    "/usr/bin/python3": "python3",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf": "fonts-dejavu-core",
    "/usr/share/mime/packages/freedesktop.org.xml": "shared-mime-info",
}


def missing_packages(*, applications: bool = True, whole_suite: bool = False) -> list[str]:
    """Return the Debian packages that are missing for embedded desktops.

    Args:
        applications: include the applications that the quickstart installs.
        whole_suite: include the applications that only the complete own suite requires.
    """
    programs = _PROGRAMS | (_APPLICATIONS if applications else {}) | (_FURTHER_APPLICATIONS if whole_suite else {})
    missing = {package for program, package in programs.items() if shutil.which(program) is None}
    missing |= {package for file, package in _FILES.items() if not Path(file).exists()}
    if applications and find_browser() is None:
        missing.add("chromium")
    return sorted(missing)
