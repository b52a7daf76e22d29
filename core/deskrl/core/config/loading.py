"""Loading of the run configuration from its sources, and the resolved configuration of a run directory."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
    TomlConfigSettingsSource,
)

from deskrl.core.config.config_errors import table_keys, unknown_option_error, unparsable_value_error, validation_error
from deskrl.core.config.renamed_keys import translate
from deskrl.core.config.run import RunConfig
from deskrl.core.config.table_options import join_table_options
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_atomically
from deskrl.core.presets import PRESETS

_VERSION = "deskrl_version"
"""Key of a resolved configuration that holds the version of deskrl that wrote it; versions up to 0.1.0 lack it."""
_ADDRESS_LIST = "--desktop.remote.addresses"
_SourceOf = Callable[[type[BaseSettings]], PydanticBaseSettingsSource]
_IPV6_LIST = re.compile(r"\[[^\"\]]*:")


class _PresetSource(PydanticBaseSettingsSource):
    """Settings source with the values of the preset that the sources before it have selected."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return no value: `__call__` returns all values at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the values of the preset; none for an unknown preset, which the schema rejects."""
        name = self.current_state.get("preset", "deskrl")
        return copy.deepcopy(dict(PRESETS[name])) if name in PRESETS else {}


def load_config(path: Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Load a run configuration.

    Args:
        path: TOML file.
        arguments: command-line options that override it: `["--learner.grpo.num_updates", "3"]`.

    Raises:
        UserError: the file cannot be read or parsed, or has unknown keys or invalid values.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found", "give a run configuration, such as deploy/runs/smoke.toml")
    if {"run", "seeds"} <= keys_of_file(path):
        raise UserError(f"{path}: is a sweep configuration, not a run configuration", f"use deskrl sweep {path}")
    return _load(lambda schema: TomlConfigSettingsSource(schema, toml_file=path), str(path), arguments)


def load_values(values: Mapping[str, Any], origin: str, arguments: Sequence[str] = ()) -> RunConfig:
    """Load a run configuration from nested values instead of a TOML file, with the same precedence.

    Args:
        values: nested values, as parsed from a TOML file.
        origin: where they come from, for error messages.
        arguments: command-line options that override them.

    Raises:
        UserError: there are unknown keys or invalid values.
    """
    return _load(lambda schema: InitSettingsSource(schema, dict(values)), origin, arguments)


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested tables with their values; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def overridden_keys(arguments: Sequence[str]) -> set[str]:
    """Return the dotted keys that the environment or the command line set."""
    options = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    prefix, delimiter = "DESKRL_", "__"
    variables = {name.removeprefix(prefix).lower() for name in os.environ if name.startswith(prefix)}
    return options | {name.replace(delimiter, ".") for name in variables}


def keys_of_file(path: Path) -> set[str]:
    """Return the dotted keys that a TOML file sets; empty for a file that is not readable as TOML."""
    try:
        return {key for key, _ in dotted(tomllib.loads(path.read_text(encoding="utf-8")))}
    except (OSError, ValueError):
        return set()


def _load(source_of: _SourceOf, origin: str, arguments: Sequence[str]) -> RunConfig:
    return _parse(_schema(source_of, is_full=False), origin, arguments)


def _schema(source_of: _SourceOf, *, is_full: bool) -> type[RunConfig]:
    """Return the schema with its sources; a full source has no environment, command line or preset beside it."""

    class BoundRunConfig(RunConfig):
        """Schema with the sources of this configuration."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if is_full:
                return (source_of(settings_cls),)
            return init_settings, env_settings, source_of(settings_cls), _PresetSource(settings_cls)

    return BoundRunConfig


def _parse(schema: type[RunConfig], origin: str, arguments: Sequence[str]) -> RunConfig:
    """Return the configuration of a schema's sources and command-line options; raises UserError."""
    arguments = join_table_options(arguments, table_keys())
    try:
        return CliApp.run(schema, cli_args=_quote_ipv6_lists(arguments))
    except ValidationError as error:
        raise validation_error(error, origin) from error
    except SettingsError as error:
        unknown = unknown_option_error(arguments)
        raise unknown or unparsable_value_error(str(error), arguments) from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also a number of 4300 digits
        raise UserError(f"{origin}: not readable as TOML: {one_line(error, 300)}", "correct the file") from error


def _quote_ipv6_lists(arguments: Sequence[str]) -> list[str]:
    """Return the options with lists of IPv6 addresses as JSON: pydantic-settings takes their brackets for a list."""
    quoted, is_value = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option == _ADDRESS_LIST and equals and _IPV6_LIST.match(value):
            argument = f"{option}={json.dumps(value.split(','))}"
        elif is_value and _IPV6_LIST.match(argument):
            argument = json.dumps(argument.split(","))
        is_value = argument == _ADDRESS_LIST
        quoted.append(argument)
    return quoted


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, with the version of deskrl, as JSON that `read_resolved` reads."""
    values = {_VERSION: _deskrl_version(), **config.model_dump(mode="json")}
    write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_resolved(path: Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Read a resolved configuration regardless of the environment. Keys renamed since it was written are translated.

    Args:
        path: JSON file that `dump_config` has written.
        arguments: command-line options that override it.

    Raises:
        UserError: the file cannot be read, is damaged, or has keys that this version of deskrl does not have.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found", "give the directory of a run that was started") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}", "restore the file, or start a new run") from error
    version = values.pop(_VERSION, "0.1.0 or earlier")
    schema = _schema(lambda bound: InitSettingsSource(bound, translate(values)), is_full=True)
    try:
        config = schema()
    except ValidationError as error:
        problem = validation_error(error, str(path)).message
        if any(item["type"] == "extra_forbidden" for item in error.errors()):
            problem += f"; the file was written by deskrl {version}, this is {_deskrl_version()}"
            raise UserError(problem, f"use deskrl {version} for this run") from error
        raise UserError(f"{problem}; the file is damaged", "restore the file, or start a new run") from error
    return _parse(schema, str(path), arguments) if arguments else config


def _deskrl_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version("deskrl")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
