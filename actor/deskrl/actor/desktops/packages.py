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
_FILES = {
    "/usr/bin/python3": "python3",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf": "fonts-dejavu-core",
    "/usr/share/mime/packages/freedesktop.org.xml": "shared-mime-info",
}


def missing_packages(*, applications: bool = True) -> list[str]:
    """Debian packages to install before an embedded desktop starts (with `applications`: runs deskrl's own suite)."""
    programs = _PROGRAMS | (_APPLICATIONS if applications else {})
    missing = {package for program, package in programs.items() if shutil.which(program) is None}
    missing |= {package for file, package in _FILES.items() if not Path(file).exists()}
    return sorted(missing)
