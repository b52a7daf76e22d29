"""deskrl's wheel, and an environment in which it is installed without a clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
SHIM = SITE_PACKAGES / "torchvision_shim.pth"
"""File of deploy/cpu/install_shim.py, in environments with a CPU build of torch."""


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources without network access; return its path in `folder`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = [package.partition("/")[0] for package in wheel["packages"]] + list(wheel["shared-data"])
    copy = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*_pb2*")
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", *sources):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    arguments = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={folder}", str(copy)]
    subprocess.run([*pip, *arguments], check=True)
    (built,) = folder.glob("*.whl")
    return built


class Installation:
    """Virtual environment with a wheel of deskrl; its other packages are those of the environment of the tests.

    Args:
        folder: directory that is created for it.
        wheel: wheel of deskrl.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.root = folder / "environment"
        self.work_dir = folder / "elsewhere"
        self.work_dir.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.root)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(self.root / "bin" / "python"), "--quiet"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
        (self.packages,) = self.root.glob("lib/python*/site-packages")
        # The path alone, so that the .pth file of the editable installation there is not read.
        shim = SHIM.read_text(encoding="utf-8") if SHIM.exists() else ""
        (self.packages / "zz_environment_of_the_tests.pth").write_text(f"{SITE_PACKAGES}\n{shim}", encoding="utf-8")

    @property
    def share(self) -> Path:
        """Directory of the run configurations, sweeps, dashboards and alert rules."""
        return self.root / "share" / "deskrl"

    def run(self, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment outside of the clone; its output includes standard error.

        Args:
            command: name of the program, and its arguments.
            timeout_s: time after which it is killed.
        """
        program = self.root / "bin" / command[0]
        return subprocess.run(
            [str(program), *command[1:]],
            cwd=self.work_dir,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _environment(self) -> Mapping[str, str]:
        others = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**others, "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
