"""Repairs an environment with a CPU build of torch and CUDA builds of torchvision, torchaudio or torchcodec.

    python deploy/cpu/install_shim.py

pip installs such a combination if only the default package index is available. The compiled parts of the CUDA builds
cannot be loaded, and transformers and vLLM fail when they import them. This script installs `torchvision_shim.py` for
torchvision, and uninstalls torchaudio and torchcodec (audio and video, which deskrl does not use). It changes only
packages that cannot be imported, in the environment of the interpreter that runs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_MODULE = "torchvision_shim"
_MISSING_OPERATORS = "operator torchvision::"


def import_error(package: str) -> str | None:
    """Return the error of importing a package in a new interpreter; None for success or if it is not installed."""
    program = f"import importlib.util, sys\nif importlib.util.find_spec({package!r}): import {package}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def install_torchvision_shim() -> None:
    """Copy the shim into site-packages and write its .pth file."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(Path(__file__).with_name(f"{_MODULE}.py"), site_packages / f"{_MODULE}.py")
    (site_packages / f"{_MODULE}.pth").write_text(f"import {_MODULE}; {_MODULE}.install()\n", encoding="utf-8")


def main() -> int:
    """Repair broken packages; return 0 if all can be imported afterwards."""
    error = import_error("torchvision")
    if error is not None and _MISSING_OPERATORS in error:
        print(f"torchvision: {error}: installing the shim")
        install_torchvision_shim()
    for package in ("torchaudio", "torchcodec"):
        error = import_error(package)
        if error is not None:
            print(f"{package}: {error}: uninstalling it")
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", package], check=True)
    failures = {
        package: error for package in ("torchvision", "torchaudio", "torchcodec") if (error := import_error(package))
    }
    for package, error in failures.items():
        print(f"{package} still cannot be imported: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
