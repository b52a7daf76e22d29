"""Environment of OSWorld's evaluators: location, installation, and the names of available metrics and getters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json

DESKTOP_ENV_VERSION = "1.0.2"
"""Installed version of the package desktop-env."""

PROCESS_SCRIPT = Path(__file__).with_name("evaluator_process.py")
"""Script of the evaluator process."""

# Packages that getters and metrics import. The requirements of desktop-env conflict on current Python versions and
# include PyTorch.
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
_UNAVAILABLE_GETTERS = _BROWSER_GETTERS | _GUEST_GETTERS | {"vm_terminal_output", "vm_wallpaper", "replay"}
"""Unavailable getters, which need the browser's debugging port, accessibility trees or accounts."""
_UNAVAILABLE_METRICS = {"check_python_file_by_test_suite"}
"""Unavailable metrics, which would run the policy's programs on this machine."""


@dataclass(frozen=True)
class InstalledEvaluators:
    """Metrics and getters of the installed environment; empty if it is not installed."""

    metrics: frozenset[str]
    """Names of metrics."""
    getters: frozenset[str]
    """Types of getters."""


def environment_dir() -> Path:
    """Return the environment's directory: DESKRL_EVALUATORS, or `deskrl/evaluators` in the user's data directory."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("DESKRL_EVALUATORS") or data / "deskrl" / "evaluators")


def interpreter_path() -> Path:
    """Return the path of the environment's Python interpreter."""
    return environment_dir() / "bin" / "python"


@cache
def installed_evaluators() -> InstalledEvaluators:
    """Return the installed metrics and getters."""
    try:
        names = json.loads((environment_dir() / "names.json").read_text(encoding="utf-8"))
    except OSError:
        return InstalledEvaluators(frozenset(), frozenset())
    return InstalledEvaluators(
        frozenset(names["metrics"]) - _UNAVAILABLE_METRICS, frozenset(names["getters"]) - _UNAVAILABLE_GETTERS
    )


def install() -> int:
    """Create or complete the environment and return the exit status of the command.

    Raises:
        UserError: a package cannot be installed, or the installed evaluators do not work.
    """
    directory = environment_dir()
    print(f"installing OSWorld's evaluators (desktop-env {DESKTOP_ENV_VERSION}) into {directory}", flush=True)
    pip_install = [str(interpreter_path()), "-m", "pip", "install", "--quiet"]
    steps = [
        [sys.executable, "-m", "venv", str(directory)],
        [*pip_install, "--no-deps", f"desktop-env=={DESKTOP_ENV_VERSION}"],
        [*pip_install, *_PACKAGES],
    ]
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
            raise UserError(f"{' '.join(step[:5])} … failed: {reason}", "fix the cause and run the same command again")
    result = subprocess.run(
        [str(interpreter_path()), str(PROCESS_SCRIPT)],
        input='{"names": true}\n',
        capture_output=True,
        text=True,
        check=False,
    )
    names = json.loads(result.stdout or "{}")
    if "metrics" not in names:
        reason = names.get("fault") or (result.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(f"the installed evaluators do not work: {reason}", f"remove {directory} and install again")
    write_json(directory / "names.json", names)
    print(f"installed {len(names['metrics'])} metrics and {len(names['getters'])} getters", flush=True)
    return 0
