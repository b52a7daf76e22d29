"""Hints of errors: every configuration key, command, option and file that a hint names exists."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deskrl.cli import data_commands, role_commands, run_commands, run_management_commands, task_commands
from deskrl.cli.arguments import Commands, Parser
from deskrl.core.config.config_errors import known_keys
from deskrl.launch.arpo.keys import rule_of

ROOT = Path(__file__).parents[2]
LAYERS = ("actor", "analysis", "cli", "core", "env", "inference", "launch", "learner", "models", "replay", "testing")
PLACEHOLDER = "\0"
"""Stands for a value that is inserted into a text."""

_ERROR_NAMES = ("UserError", "Problem", "AddressError", "error", "warning", "die")
"""Functions and classes whose last argument is a hint."""
_FILE_SUFFIXES = ("json", "py", "md", "sh", "toml", "yaml", "safetensors", "jinja", "pem", "sqlite", "html", "qcow2")
_COMMAND = re.compile(r"(?:`|run |mean |see |to |by )deskrl ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)?)")
_KEY = re.compile(r"(?<![\w./-])([a-z]+(?:\.[a-z_0-9*]+)+)(?![\w/])")
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_.0-9-]*)")
_PATH = re.compile(r"(?<![\w./-])((?:deploy|docs|tests|examples)/[\w./-]+)")


class Hint(NamedTuple):
    """Hint in the source."""

    file: Path
    line: int
    text: str


def text_of(node: ast.expr) -> str | None:
    """Return the text of a string expression with placeholders for inserted values; None for other expressions."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) or PLACEHOLDER for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (text_of(left) or PLACEHOLDER) + (text_of(right) or PLACEHOLDER)
        case ast.IfExp(body=body, orelse=other):
            return f"{text_of(body) or ''} {text_of(other) or ''}"
    return None


def hints_of(path: Path) -> Iterator[Hint]:
    """Yield the hints in a module: last arguments of errors, results of hint functions, and constants named HINT."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        candidates: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _ERROR_NAMES and len(node.args) >= 2:
                candidates.append(node.args[-1])
        elif isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if any("hint" in target.lower() for target in targets):
                inner = getattr(node.value, "values", None) or getattr(node.value, "elts", None) or []
                candidates += [node.value, *(it for it in inner if isinstance(it, ast.expr))]
        elif isinstance(node, ast.FunctionDef) and "hint" in node.name:
            candidates += [it.value for it in ast.walk(node) if isinstance(it, ast.Return) and it.value is not None]
        for candidate in candidates:
            if (text := text_of(candidate)) is not None:
                yield Hint(path, candidate.lineno, text)


def all_hints() -> list[Hint]:
    files = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
    return [hint for file in files for hint in hints_of(file)]


def parser_of_commands() -> Parser:
    parser = Parser(prog="deskrl")
    commands = Commands(parser, "command")
    for module in (run_commands, run_management_commands, data_commands, task_commands, role_commands):
        module.add_commands(commands)
    return parser


def walk_commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield all commands and their parsers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield f"{prefix}{name}", subparser
                yield from walk_commands(subparser, f"{prefix}{name} ")


COMMANDS = dict(walk_commands(parser_of_commands()))
OPTIONS = {
    option.removeprefix("--")
    for parser in COMMANDS.values()
    for action in parser._actions
    for option in action.option_strings
}
FOREIGN_OPTIONS = {"shm-size", "help", "add-subuids", "add-subgids", "no-deps"}
"""Options of docker, argparse, usermod and pip."""
SECTIONS = {key.split(".")[0] for key in known_keys()}
ARPO_SECTIONS = {"data", "algorithm", "worker", "env", "trainer", "wandb"}


def unknown_names(text: str) -> Iterator[str]:
    """Yield what a hint names and does not exist."""
    for name in _COMMAND.findall(text):
        if name not in COMMANDS and name.split(" ")[0] not in COMMANDS:
            yield f"deskrl {name}"
    for key in _KEY.findall(text):
        is_file = key.rpartition(".")[2] in _FILE_SUFFIXES
        section = key.split(".")[0]
        if not is_file and section in SECTIONS and key not in known_keys() and not has_prefix(key):
            yield key
        if not is_file and section in ARPO_SECTIONS - SECTIONS and rule_of(key) is None:
            yield key
    for option in _OPTION.findall(text):
        if option.rstrip(".") not in OPTIONS | known_keys() | FOREIGN_OPTIONS:
            yield f"--{option}"
    for path in _PATH.findall(text):
        if not (ROOT / path.rstrip(".")).exists():
            yield path


def has_prefix(key: str) -> bool:
    """Return whether a key is inside a free table of the configuration."""
    return key.startswith(("inference.engine_args.", "tracker_options."))


def test_hints_are_found() -> None:
    texts = [hint.text for hint in all_hints()]
    assert len(texts) > 150
    assert any("security.certificates_dir" in text for text in texts)
    assert any("`deskrl certificates`" in text for text in texts)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_hint_names_exists(layer: str) -> None:
    unknown = [
        f"{hint.file.relative_to(ROOT)}:{hint.line}: {name}"
        for hint in all_hints()
        if hint.file.is_relative_to(ROOT / layer)
        for name in unknown_names(hint.text)
    ]
    assert not unknown


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hint_is_an_instruction_of_one_line(layer: str) -> None:
    odd = [
        f"{hint.file.relative_to(ROOT)}:{hint.line}: {hint.text!r}"
        for hint in all_hints()
        if hint.file.is_relative_to(ROOT / layer) and hint.text.strip()
        if "\n" in hint.text or "(hint:" in hint.text or hint.text.endswith(".")
    ]
    assert not odd


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("set learner.grpo.clip_hihg to 0.3", ["learner.grpo.clip_hihg"]),
        ("run `deskrl certify` again", ["deskrl certify"]),
        ("choose another port with --replay.adress", ["--replay.adress"]),
        ("see docs/no-such-page.md", ["docs/no-such-page.md"]),
        ("set worker.rollout.m=2", ["worker.rollout.m"]),
        ("set inference.engine_args.max_num_seqs, or model.safetensors", []),
        ("run `deskrl up` with --runs, see deploy/runs/smoke.toml", []),
    ],
)
def test_an_unknown_name_is_found(text: str, unknown: list[str]) -> None:
    assert list(unknown_names(text)) == unknown
