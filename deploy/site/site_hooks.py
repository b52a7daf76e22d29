"""Hooks of MkDocs: adds the pages outside of docs/ to the site, adapts links to them, and converts LaTeX to MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/README.md": "tests.md",
}
"""Pages outside of docs/ by their path in the repository, and their names on the site."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")
_EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of docs/."""
    root = Path(config.config_file_path).parent
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links between files of the repository by links between pages of the site."""
    name = page.file.src_uri
    sources = {site_name: source for source, site_name in PAGES.items()}
    folder = posixpath.dirname(sources.get(name, f"docs/{name}"))

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        site_target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if site_target is None:
            return link[0]
        return link[1] + posixpath.relpath(site_target, posixpath.dirname(name) or ".")

    return _LINK.sub(replace, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Convert equations to MathML, which browsers render without a script."""

    def to_mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    return _EQUATION.sub(to_mathml, content)
