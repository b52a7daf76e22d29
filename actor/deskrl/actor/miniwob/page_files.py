"""Files of MiniWoB++: unpacks the pages of the package `miniwob`, and finds the files that one page loads."""

from __future__ import annotations

import posixpath
import re
from functools import lru_cache
from pathlib import Path

PAGES_FOLDER = "miniwob"
"""Folder of the pages in the folder of html files."""
_LIBRARY_PATH = re.compile(r"\.\./((?:core|common)/[\w./-]+)")
_STYLE_URL = re.compile(r"""url\(["']?([\w./-]+)["']?\)""")


def page_path(html: Path, page: str) -> Path:
    """Return the path of a page in the folder of html files."""
    return html / PAGES_FOLDER / f"{page}.html"


@lru_cache(maxsize=256)
def page_dependencies(html: Path, page: str) -> tuple[str, ...]:
    """Return the files that a page loads, itself included, as sorted paths relative to `html`.

    Raises:
        OSError: the page cannot be read.
    """
    found = {f"{PAGES_FOLDER}/{page}.html"}
    for name in _LIBRARY_PATH.findall(page_path(html, page).read_text(encoding="utf-8")):
        path = html / name
        names = [file.relative_to(html).as_posix() for file in path.iterdir()] if path.is_dir() else [name]
        found.update(name for name in names if (html / name).is_file())
    for style in [name for name in found if name.endswith(".css")]:
        text = (html / style).read_text(encoding="utf-8", errors="replace")
        urls = (posixpath.normpath(posixpath.join(posixpath.dirname(style), url)) for url in _STYLE_URL.findall(text))
        found.update(url for url in urls if (html / url).is_file())
    return tuple(sorted(found))
