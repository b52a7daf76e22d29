"""Code style of the packages: sizes of functions and of core, imports and file names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "proto",
    "core",
    "models",
    "actor",
    "inference",
    "replay",
    "learner",
    "launch",
    "env",
    "analysis",
    "cli",
    "testing",
)
MAX_LINES = 80
USUAL_LINES = 35
MIN_USUAL_SHARE = 0.95
MAX_CORE_LINES = 6000
ROLE_PARALLEL_NAMES = {"__init__.py", "extensions.py", "main.py", "metrics.py"}
"""Files that several packages have for the same purpose."""


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package / "deskrl").rglob("*.py"))
    return [path for path in files if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


SOURCES = [path for package in PACKAGES for path in sources(package)]


def functions() -> Iterator[tuple[str, int]]:
    """Yield the location and the number of lines of every function, without its decorators."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_every_package_has_sources() -> None:
    assert all(sources(package) for package in PACKAGES)


def test_no_function_is_longer_than_80_lines() -> None:
    assert [f"{name}: {num_lines}" for name, num_lines in functions() if num_lines > MAX_LINES] == []


def test_nearly_all_functions_fit_on_a_screen() -> None:
    sizes = [num_lines for _, num_lines in functions()]
    assert sum(num_lines <= USUAL_LINES for num_lines in sizes) >= MIN_USUAL_SHARE * len(sizes)


def test_core_stays_small() -> None:
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources("core"))
    assert num_lines < MAX_CORE_LINES


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_of_deskrl_is_imported_by_a_string(package: str) -> None:
    """Such imports are invisible to import-linter and mypy."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
        and node.args
        and "deskrl" in ast.unparse(node.args[0])
    ]
    assert found == []


def test_file_names_are_unique() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        # A suite is named after what it checks, and an architecture has one file for each role that needs one.
        is_parallel = path.is_relative_to(ROOT / "testing") or path.parent.name == "architectures"
        if path.name not in ROLE_PARALLEL_NAMES and not is_parallel:
            places[path.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_possessive_quantifiers_are_of_single_characters() -> None:
    """Python before 3.11.5 matches a possessive group wrongly; `(?>(?:...)*)` means the same as `(?:...)*+`."""
    possessive_group = re.compile(r"(?<!\\)\)(?:[*+?]|\{[0-9,]+\})\+")
    lines = [(path, line) for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    assert [f"{path.relative_to(ROOT)}: {line}" for path, line in lines if possessive_group.search(line)] == []
