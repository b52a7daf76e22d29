"""The site of docs/: it builds without warnings, and its pages need neither a network nor a script for equations."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"https?:|<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*https?:"
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed (extra docs)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    documents = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(path) for path in documents if not (site / path / "index.html").is_file()] == []
    for name in ("contributing", "changelog", "tests"):
        assert (site / name / "index.html").is_file()


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert [str(path.relative_to(site)) for path, text in pages.items() if FOREIGN.search(text)] == []


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "algorithm" / "index.html").read_text(encoding="utf-8")
    assert text.count('display="block"') > 10
    assert 'class="arithmatex"' not in text
    assert "\\frac" not in text
