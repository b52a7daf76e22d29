"""Which Debian packages an embedded desktop needs, and which of them this machine lacks. Knows no sandbox."""

from __future__ import annotations

import shutil
from pathlib import Path

_PROGRAMS = {
    "bwrap": "bubblewrap",
    "dbus-daemon": "dbus",
    "openbox": "openbox",
    "setpriv": "util-linux",
    "Xvfb": "xvfb",
}
_APPLICATIONS = {
    "chromium": "chromium",
    "gimp": "gimp",
    "mousepad": "mousepad",
    "mtpaint": "mtpaint",
    "pcmanfm": "pcmanfm",
    "xterm": "xterm",
}
_FURTHER_APPLICATIONS = {"gnumeric": "gnumeric", "gpicview": "gpicview", "mupdf": "mupdf"}
"""What only the whole suite is played with: `deploy/install.sh suite` installs them."""

_FILES = {
    "/usr/bin/python3": "python3",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf": "fonts-dejavu-core",
    "/usr/share/mime/packages/freedesktop.org.xml": "shared-mime-info",
}


def missing_packages(*, applications: bool = True, whole_suite: bool = False) -> list[str]:
    """Debian packages to install before an embedded desktop starts.

    Args:
        applications: and has what the quickstart installs.
        whole_suite: and runs every task of deskrl's own suite.
    """
    programs = _PROGRAMS | (_APPLICATIONS if applications else {}) | (_FURTHER_APPLICATIONS if whole_suite else {})
    missing = {package for program, package in programs.items() if shutil.which(program) is None}
    missing |= {package for file, package in _FILES.items() if not Path(file).exists()}
    return sorted(missing)
