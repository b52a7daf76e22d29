"""Declaration of commands, and loading of the configuration that a command is given."""

from __future__ import annotations

import argparse
import difflib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from deskrl.core.config import RunConfig, load_config, read_resolved
from deskrl.core.config.config_errors import known_keys
from deskrl.core.errors import UserError

Perform = Callable[[argparse.Namespace, Sequence[str]], int]
"""Function of a command: takes its options and the overrides of configuration keys, returns the exit status."""

_RENAMED: Mapping[str, str] = {
    "replay-run": "reproduce",
    "learn-again": "reproduce-updates",
    "prove-checkpoint": "verify-checkpoint",
    "model": "build-model",
}
"""New name of each renamed command."""


class Parser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line, and whose help contains defaults and configuration keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: list[argparse.Action] = []
        """Arguments in the order of their declaration, including `--help`."""
        self.takes_overrides = False
        """Whether options that override keys of the configuration are accepted."""
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument; its default, if it has one, is appended to its help."""
        action = super().add_argument(*args, **kwargs)
        is_value = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
        if is_value and action.default != argparse.SUPPRESS:
            action.help = f"{action.help} (default: {action.default})"
        self.arguments.append(action)
        return action

    def format_help(self) -> str:
        """Return the help, with the keys of the configuration if the command accepts them as options."""
        text = super().format_help()
        if not self.takes_overrides:
            return text
        from deskrl.cli.configuration_keys import keys_help

        return f"{text}\n{keys_help(shutil.get_terminal_size().columns - 2)}"

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that refers to the help of the command."""
        raise UserError(message, f"see {self.prog} --help")


class Commands:
    """Commands of one level of the command line."""

    def __init__(self, parser: Parser, name: str) -> None:
        self._subparsers = parser.add_subparsers(dest=name, required=True, metavar="COMMAND")
        self.parsers: dict[str, Parser] = {}
        """Parser of each command, by its full name: `up`, `tasks check`."""

    def add(
        self, name: str, help_text: str, perform: Perform, *, role: str | None = None, takes_overrides: bool = True
    ) -> Parser:
        """Add a command and return its parser.

        Args:
            name: name of the command.
            help_text: one line of help.
            perform: function that runs the command.
            role: role whose extra provides the packages that the command needs; None: the role of the command's name.
            takes_overrides: whether options that override keys of the configuration are accepted.
        """
        command = self._subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.set_defaults(perform=perform, role=role or name, takes_overrides=takes_overrides)
        command.takes_overrides = takes_overrides
        self.parsers[command.prog.removeprefix("deskrl ")] = command
        return command

    def add_level(self, name: str, help_text: str) -> Commands:
        """Add a command that has subcommands; they are listed among the parsers of this level too."""
        level = Commands(self._subparsers.add_parser(name, help=help_text), f"{name}_command")
        level.parsers = self.parsers
        return level

    def check_name(self, name: str) -> None:
        """Check that a command exists.

        Raises:
            UserError: there is no such command; the hint is its new name or a similar one.
        """
        if name in self._subparsers.choices:
            return
        similar = difflib.get_close_matches(name, self._subparsers.choices, n=1)
        hint = f"did you mean deskrl {similar[0]}" if similar else "see deskrl --help"
        if name in _RENAMED:
            hint = f"renamed to deskrl {_RENAMED[name]}"
        raise UserError(f"{name}: unknown command", hint)


def number(kind: Any) -> Callable[[str], Any]:
    """Return a converter of options to numbers, which rejects what is not finite or out of bounds.

    Args:
        kind: type of the number with its bounds, as in `deskrl.core.config.value_types`.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def convert(text: str) -> Any:
        try:
            value = adapter.validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text[:40]}: {error.errors()[0]['msg']}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be a finite number")
        return value

    return convert


def add_config(command: argparse.ArgumentParser, help_text: str = "run configuration (TOML or resolved JSON)") -> None:
    """Add the argument for a configuration."""
    command.add_argument("config", type=Path, help=help_text)


def add_run(command: argparse.ArgumentParser, help_text: str = "run directory") -> None:
    """Add the argument for a run."""
    command.add_argument("run", type=Path, help=help_text)


def join_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with each override `--KEY VALUE` as `--KEY=VALUE`.

    The parser of a command does not know the keys of the configuration, and would take VALUE as a positional argument.
    """
    keys = known_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    joined: list[str] = []
    lacks_value = False
    for argument in arguments:
        is_option = argument.startswith("--")
        if lacks_value and not is_option:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
        key = argument.removeprefix("--")
        lacks_value = is_option and "=" not in key and ("." in key or key in keys - sections)
    return joined


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read a TOML configuration with overrides, or the resolved JSON configuration of a run, which accepts none.

    Raises:
        UserError: the configuration is invalid, or overrides are given for a resolved one.
    """
    if path.suffix != ".json":
        return load_config(path, overrides)
    if overrides:
        raise UserError(f"{path}: a resolved configuration cannot be overridden", "override its TOML file instead")
    return read_resolved(path)


def with_run(config: RunConfig) -> RunConfig:
    """Set the run of this process, before a channel is opened; returns `config`."""
    from deskrl.core import rpc
    from deskrl.core.run_dir import RunDir
    from deskrl.core.run_identity import read_identity

    rpc.set_run(read_identity(RunDir(config.run_dir), config.name))
    return config


def with_identity(config: RunConfig, role: str) -> RunConfig:
    """Set the run of this process and the certificate of its role, if the run uses certificates; returns `config`."""
    from deskrl.core import rpc

    rpc.load_own_identity(role, config.security.certificates_dir)
    return with_run(config)
