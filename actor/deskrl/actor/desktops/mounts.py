"""Paths of this machine that a sandbox sees in addition to /usr and /etc."""

from __future__ import annotations

import compileall
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from deskrl.actor import guest
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.browser_programs import find_browser

GUEST_FOLDER = Path(guest.__path__[0]).resolve()
"""Folder of the guest server's code on this machine."""
GUEST_LIBRARY = Path("/opt/deskrl/lib")
"""Folder inside the sandbox from which the guest server imports its modules."""
_PYTHON = Path("/opt/deskrl/python")
"""Folder inside the sandbox from which the desktop's interpreter `python` imports additional modules."""
_CHROME = Path("/opt/deskrl/chrome")


@cache
def guest_sources() -> dict[Path, Path]:
    """Return files that the guest server needs besides /usr (interpreter, libraries, own code) and their destinations.

    Raises:
        DesktopError: a Python package is not installed.
    """
    sources: dict[Path, Path] = {}
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        sources[Path(sys.base_prefix).resolve()] = Path(sys.base_prefix)
    for module in ("Xlib", "six", "PIL"):
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise DesktopError(f"the Python package {module} is not installed (hint: install deskrl[actor])")
        source = Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)
        sources[source] = GUEST_LIBRARY / source.name
        compiled = Path(importlib.util.cache_from_source(found.origin))
        if source.is_file() and compiled.is_file():  # beside the file, as in a package; compiling it takes 10 ms
            sources[compiled] = GUEST_LIBRARY / compiled.parent.name / compiled.name
        libraries = source.parent / "pillow.libs"  # Pillow's wheels have their C libraries beside the package
        if module == "PIL" and libraries.is_dir():
            sources[libraries] = GUEST_LIBRARY / libraries.name
    compileall.compile_dir(GUEST_FOLDER, quiet=2)  # it is read-only inside; compiling would double the start time
    sources[GUEST_FOLDER] = GUEST_LIBRARY / "deskrl" / "actor" / "guest"
    return sources


def python_arguments() -> list[str]:
    """Return bubblewrap arguments for the modules of `python`, because OSWorld's commands import pyautogui."""
    modules = {name: GUEST_LIBRARY / name for name in ("Xlib", "six.py", "deskrl")}
    modules["pyautogui.py"] = GUEST_LIBRARY / "deskrl" / "actor" / "guest" / "pyautogui.py"
    return [word for name, target in modules.items() for word in ("--symlink", str(target), str(_PYTHON / name))]


@cache
def chrome_arguments() -> tuple[str, ...]:
    """Return bubblewrap arguments for a copy of Chromium's folder in which the program is named `chrome`.

    The process name is the program's file name, and OSWorld's scripts search for processes named `chrome`.
    """
    program = find_browser()
    if program is None:
        return ()
    others = [entry for entry in program.parent.iterdir() if entry != program]
    arguments = ["--ro-bind", str(program), str(_CHROME / "chrome")]
    for entry in others:
        arguments += ["--symlink", str(entry), str(_CHROME / entry.name)]
    return tuple(arguments)


@cache
def top_level_arguments() -> tuple[str, ...]:
    """Return bubblewrap arguments for /bin, /lib etc. as on this machine: links into /usr, or separate folders."""
    arguments: list[str] = []
    for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        folder = Path("/", name)
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            arguments += ["--ro-bind", str(folder), str(folder)]
    return tuple(arguments)
