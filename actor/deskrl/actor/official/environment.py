"""The environment of OSWorld's evaluators: where it lies, how it is installed, what it provides. Runs no evaluator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.runfolder import write_json

VERSION = "1.0.2"
"""Of desktop-env."""

PROCESS = Path(__file__).parent / "process.py"

# What its getters and metrics import. Its own pins clash with one another on a present-day Python, and bring PyTorch.
_PACKAGES = (
    *("beautifulsoup4", "borb", "chardet", "cssselect", "docker", "fastdtw", "filelock", "formulas", "func-timeout"),
    *("gymnasium", "imagehash", "librosa", "lxml", "mutagen", "numpy", "odfpy", "opencv-python-headless", "openpyxl"),
    *("pandas", "pdfplumber", "pillow", "playwright", "psutil", "pyacoustid", "pydrive", "pymupdf", "pypdf", "pypdf2"),
    *("python-docx", "python-dotenv", "python-pptx", "pytz", "pyyaml", "rapidfuzz", "requests", "requests-toolbelt"),
    *("scikit-image", "scipy", "tldextract", "tqdm", "xmltodict"),
)

_BROWSER_GETTERS = {
    *("active_tab_html_parse", "active_tab_info", "active_tab_url_parse", "chrome_saved_address"),
    *("gotoRecreationPage_and_get_html_content", "info_from_website", "number_of_search_results", "open_tabs_info"),
    *("page_info", "pdf_from_url", "url_dashPart", "url_path_parse"),
}
_GUEST_GETTERS = {"accessibility_tree", "active_url_from_accessTree", "googledrive_file", "vlc_playing_info"}
_UNREACHABLE = _BROWSER_GETTERS | _GUEST_GETTERS | {"vm_terminal_output", "vm_wallpaper", "replay"}
"""Getters that need the browser's debugging port, accessibility trees or accounts: not offered."""


@dataclass(frozen=True)
class Provided:
    """Names that the installed environment judges by; none where it is not installed."""

    metrics: frozenset[str]
    getters: frozenset[str]


def folder() -> Path:
    """Where the environment lies: DESKRL_EVALUATORS, or `deskrl/evaluators` in the user's data folder."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("DESKRL_EVALUATORS") or data / "deskrl" / "evaluators")


def interpreter() -> Path:
    """Its Python."""
    return folder() / "bin" / "python"


@cache
def provided() -> Provided:
    """What is installed."""
    try:
        names = json.loads((folder() / "names.json").read_text(encoding="utf-8"))
    except OSError:
        return Provided(frozenset(), frozenset())
    return Provided(frozenset(names["metrics"]), frozenset(names["getters"]) - _UNREACHABLE)


def install() -> int:
    """Make the environment anew, or finish it; returns the exit status.

    Raises:
        UserError: a package cannot be installed.
    """
    place = folder()
    print(f"installing OSWorld's evaluators (desktop-env {VERSION}) into {place}", flush=True)
    steps = [
        [sys.executable, "-m", "venv", str(place)],
        [str(interpreter()), "-m", "pip", "install", "--quiet", "--no-deps", f"desktop-env=={VERSION}"],
        [str(interpreter()), "-m", "pip", "install", "--quiet", *_PACKAGES],
    ]
    for step in steps:
        ended = subprocess.run(step, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            told = (ended.stderr.strip() or ended.stdout.strip() or "it said nothing").splitlines()[-1]
            raise UserError(f"{' '.join(step[:5])} … failed: {told}", "mend that and give the same command again")
    asked = subprocess.run(
        [str(interpreter()), str(PROCESS)], input='{"names": true}\n', capture_output=True, text=True, check=False
    )
    names = json.loads(asked.stdout or "{}")
    if "metrics" not in names:
        told = names.get("fault") or (asked.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"the installed evaluators do not work: {told}", f"remove {place} and install anew")
    write_json(place / "names.json", names)
    print(f"{len(names['metrics'])} metrics and {len(names['getters'])} getters are there", flush=True)
    return 0
