"""Mends an environment whose torch is a CPU build and whose torchvision, torchaudio or torchcodec are CUDA builds.

    python deploy/cpu/install_shim.py

pip brings such a mixture where only the package index has wheels: the extras' compiled parts cannot be loaded, and
transformers and vLLM fail while they import them. torchvision gets `torchvision_shim.py`; torchaudio and torchcodec
(sound and video, of no use here) are uninstalled. What imports well is left alone, so running this twice, or on a
healthy environment, changes nothing. Works on the environment of the interpreter that runs it.
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
    """What `import package` says in a fresh interpreter; None if it works or the package is not installed."""
    program = f"import importlib.util, sys\nif importlib.util.find_spec({package!r}): import {package}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def install_torchvision_shim() -> None:
    """Put the shim and its .pth file into site-packages."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(Path(__file__).with_name(f"{_MODULE}.py"), site_packages / f"{_MODULE}.py")
    (site_packages / f"{_MODULE}.pth").write_text(f"import {_MODULE}; {_MODULE}.install()\n", encoding="utf-8")


def main() -> int:
    """Mend what is broken; 0 if everything imports afterwards."""
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
