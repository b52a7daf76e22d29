"""How commands are declared and their configurations read. Knows no command."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from deskrl.core.config import RunConfig, load_config, read_resolved
from deskrl.core.errors import UserError

Perform = Callable[[argparse.Namespace, Sequence[str]], int]
"""Performs a command, given its options and what overrides keys of the configuration; returns the exit status."""


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message, f"see {self.prog} --help")


class Commands:
    """Commands of one level of the command line."""

    def __init__(self, parser: argparse.ArgumentParser, name: str) -> None:
        self._subparsers = parser.add_subparsers(dest=name, required=True, metavar="COMMAND")

    def add(
        self, name: str, help_text: str, perform: Perform, *, role: str | None = None, takes_overrides: bool = True
    ) -> argparse.ArgumentParser:
        """A command.

        Args:
            name: as it is typed.
            help_text: one line.
            perform: does it.
            role: whose packages it needs, if it is not called as that role.
            takes_overrides: whether keys of the configuration may follow as options.
        """
        command = self._subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.set_defaults(perform=perform, role=role or name, takes_overrides=takes_overrides)
        return command

    def add_level(self, name: str, help_text: str) -> Commands:
        """A command that has commands."""
        return Commands(self._subparsers.add_parser(name, help=help_text), f"{name}_command")


def add_config(command: argparse.ArgumentParser, help_text: str = "run configuration") -> None:
    """The argument that names a configuration."""
    command.add_argument("config", type=Path, help=help_text)


def add_run(command: argparse.ArgumentParser, help_text: str = "the run's folder") -> None:
    """The argument that names a run."""
    command.add_argument("run", type=Path, help=help_text)


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A TOML configuration with overrides, or the resolved JSON of a run, which takes none."""
    if path.suffix != ".json":
        return load_config(path, overrides)
    if overrides:
        raise UserError(f"{path} is a resolved configuration", "override its TOML file instead")
    return read_resolved(path)


def identified(config: RunConfig, role: str) -> RunConfig:
    """Take on the role's identity, before any channel is made."""
    if config.security.folder is not None:
        importlib.import_module("deskrl.core.rpc").identify_as(role, config.security.folder)
    return config
