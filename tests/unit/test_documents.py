"""The documents: files, functions, classes and configuration keys that they name exist in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deskrl.core.config.config_errors import known_keys

ROOT = Path(__file__).parents[2]
NAMING = ["CONTRIBUTING.md", "docs/architecture.md", "docs/algorithm.md", "docs/extending.md"]
"""Documents whose names of files, functions and classes are checked."""
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"runs", "build"}
PACKAGES = [path.parent for path in ROOT.glob("*/deskrl")]
SOURCES = [path for package in PACKAGES for path in (package / "deskrl").rglob("*.py")]
JOINS = {" ", ", ", " and ", ", table ", ", tables ", " table "}
"""Text between a file and the names in it: `losses.py` `policy_loss`, `token_denominators`."""
IDENTIFIERS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}


def codes(document: str) -> list[tuple[str, str]]:
    """Return the text before each inline code, and the code, outside of code blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    pieces = re.split(r"`([^`\n]+)`", text)
    return [(before.replace("\n", " "), code) for before, code in zip(pieces[::2], pieces[1::2], strict=False)]


def find_files(code: str) -> list[Path] | None:
    """Return the files or the folder that a code names, whether they exist or not; None if it names none.

    A name without a folder is that of a file of the packages, of which there may be several.
    """
    if "/" in code:
        return [ROOT / code] if code.partition("/")[0] in FOLDERS and " " not in code else None
    if not re.fullmatch(r"\w+\.py", code):
        return None
    return [path for path in SOURCES if path.name == code] or [ROOT / code]


@cache
def entry_point_groups() -> set[str]:
    """Return the strings in the packages that have the form of an entry-point group."""
    return {name for path in SOURCES for name in re.findall(r'"(deskrl\.[a-z_]+)"', path.read_text(encoding="utf-8"))}


@cache
def names_in(path: Path) -> set[str]:
    """Return the names that a file defines: `function`, `CONSTANT`, `Class`, `Class.method`, `Class.field`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".proto":
        return set(re.findall(r"\b(?:service|rpc|message|enum)\s+(\w+)", text))
    return set(defined(ast.parse(text).body, ""))


def defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield prefix + ast.unparse(target)
        elif isinstance(node, ast.ImportFrom):
            yield from (prefix + (alias.asname or alias.name) for alias in node.names)


def is_defined(dotted: str) -> bool:
    """Return whether a dotted name of package deskrl is a module, or is defined in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        for package in PACKAGES:
            module = package.joinpath(*parts[:length])
            path = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
            if path.is_file():
                return length == len(parts) or ".".join(parts[length:]) in names_in(path)
    return False


@pytest.mark.parametrize("document", NAMING)
def test_the_files_that_a_document_names_exist(document: str) -> None:
    named = [(code, files) for _, code in codes(document) if (files := find_files(code)) is not None]
    assert [code for code, files in named if not all(path.exists() for path in files)] == []


@pytest.mark.parametrize("document", NAMING)
def test_the_functions_and_classes_that_a_document_names_exist(document: str) -> None:
    missing: list[str] = []
    files: list[Path] = []
    for before, code in codes(document):
        if (named := find_files(code)) is not None:
            files = [path for path in named if path.is_file() and path.suffix in (".py", ".proto")]
        elif code.startswith("deskrl.") and IDENTIFIERS.fullmatch(code):
            missing += [] if is_defined(code) or code in entry_point_groups() else [code]
        elif files and before in JOINS and IDENTIFIERS.fullmatch(code):
            missing += [] if any(code in names_in(path) for path in files) else [f"{files[0].name} {code}"]
        else:
            files = []
    assert missing == []


@pytest.mark.parametrize("document", ["README.md", *NAMING[:1], *PAGES])
def test_the_configuration_keys_that_a_document_names_exist(document: str) -> None:
    named = {code.removeprefix("--").partition(" ")[0] for _, code in codes(document)}
    keys = {name for name in named if re.fullmatch(r"[a-z]\w*(\.[a-z]\w*)+", name) and name.split(".")[0] in SECTIONS}
    files = {name for name in keys if Path(name).suffix in {".json", ".md", ".pem", ".py", ".sh", ".toml"}}
    assert sorted(keys - files - known_keys()) == []
