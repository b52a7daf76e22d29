"""What a sandbox sees of the machine beyond /usr and /etc. Knows paths, starts nothing."""

from __future__ import annotations

import compileall
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError

LIBRARY = Path("/opt/deskrl/lib")
"""Where the guest server's modules lie inside."""
_PYTHON = Path("/opt/deskrl/python")
"""What the desktop's interpreter called `python` imports besides its own."""
_CHROME = Path("/opt/deskrl/chrome")
_BROWSERS = ("/usr/lib/chromium/chromium", "/usr/lib/chromium-browser/chromium-browser", "/opt/google/chrome/chrome")


@cache
def guest_sources() -> dict[Path, Path]:
    """What the guest server needs beyond /usr, and where it appears: the interpreter, three libraries, our code."""
    sources: dict[Path, Path] = {}
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        sources[Path(sys.base_prefix).resolve()] = Path(sys.base_prefix)
    for module in ("Xlib", "six", "PIL"):
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise DesktopError(f"the Python package {module} is not installed: install deskrl[actor]")
        place = Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)
        sources[place] = LIBRARY / place.name
        libraries = place.parent / "pillow.libs"  # Pillow's wheels find their C libraries beside the package
        if module == "PIL" and libraries.is_dir():
            sources[libraries] = LIBRARY / libraries.name
    guest = Path(__file__).resolve().parent.parent / "guest"
    compileall.compile_dir(guest, quiet=2)  # inside it is read-only, and compiling would be half of a start
    sources[guest] = LIBRARY / "deskrl" / "actor" / "guest"
    return sources


def python_arguments() -> list[str]:
    """Links that make up the folder of what `python` imports: OSWorld's commands import pyautogui."""
    modules = {name: LIBRARY / name for name in ("Xlib", "six.py", "deskrl")}
    modules["pyautogui.py"] = LIBRARY / "deskrl" / "actor" / "guest" / "pyautogui.py"
    return [word for name, target in modules.items() for word in ("--symlink", str(target), str(_PYTHON / name))]


@cache
def chrome_arguments() -> tuple[str, ...]:
    """Chromium's folder over again with its program named `chrome`: processes are called after the program's file,
    and scripts look for them by that name."""
    for program in map(Path, _BROWSERS):
        if program.is_file():
            links = [entry for entry in program.parent.iterdir() if entry != program]
            arguments = ["--ro-bind", str(program), str(_CHROME / "chrome")]
            for entry in links:
                arguments += ["--symlink", str(entry), str(_CHROME / entry.name)]
            return tuple(arguments)
    return ()


@cache
def top_level_arguments() -> tuple[str, ...]:
    """/bin and its like, as the machine has them: links into /usr, or folders of their own."""
    arguments: list[str] = []
    for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        folder = Path("/", name)
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            arguments += ["--ro-bind", str(folder), str(folder)]
    return tuple(arguments)
