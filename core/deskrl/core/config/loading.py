"""Reads a configuration from its file, and reads again what was resolved. Knows sources and refusals; knows no key."""

from __future__ import annotations

import copy
import os
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

from deskrl.core.config.run import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.presets import PRESETS
from deskrl.core.runfolder import write_atomically


class _PresetSource(PydanticBaseSettingsSource):
    """The preset that the sources before this one have named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Nothing field by field: values come all at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The preset's values; of a name that is none nothing, and the schema refuses it."""
        name = self.current_state.get("preset", "deskrl")
        return copy.deepcopy(dict(PRESETS[name])) if name in PRESETS else {}


def load_config(path: Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: TOML file.
        arguments: overrides as they stand on the command line: `["--learner.grpo.num_updates", "3"]`.

    Raises:
        UserError: the file cannot be read, is no TOML, or holds unknown or contradictory keys.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", "name a run configuration, such as deploy/runs/smoke.toml")
    return _load(lambda schema: TomlConfigSettingsSource(schema, toml_file=path), str(path), arguments)


def load_values(values: Mapping[str, Any], origin: str, arguments: Sequence[str] = ()) -> RunConfig:
    """A run configuration from nested values in place of a file; environment and command line win as they do there.

    Args:
        values: as a TOML file would hold them.
        origin: where they come from, for refusals.
        arguments: overrides as they stand on the command line.
    """
    return _load(lambda schema: InitSettingsSource(schema, dict(values)), origin, arguments)


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested tables, with their values; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def overridden_keys(arguments: Sequence[str]) -> set[str]:
    """Dotted keys that environment or command line set."""
    options = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    prefix, delimiter = "DESKRL_", "__"
    variables = {name.removeprefix(prefix).lower() for name in os.environ if name.startswith(prefix)}
    return options | {name.replace(delimiter, ".") for name in variables}


def _load(
    source_of: Callable[[type[BaseSettings]], PydanticBaseSettingsSource], origin: str, arguments: Sequence[str]
) -> RunConfig:
    class BoundRunConfig(RunConfig):
        """The same schema, bound to a source of its own."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, source_of(settings_cls), _PresetSource(settings_cls)

    try:
        return CliApp.run(BoundRunConfig, cli_args=list(arguments))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{origin}: not readable as TOML: {error}", "mend the file") from error
    except ValidationError as error:
        raise UserError(f"{origin}: {_describe(error)}", "mend the key, or remove it") from error
    except SettingsError as error:  # of the command line or the environment, and it says which
        raise UserError(_describe(error), "mend the key, or remove it") from error


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as JSON; `read_resolved` reads it back."""
    write_atomically(path, (config.model_dump_json(indent=2) + "\n").encode())


def read_resolved(path: Path) -> RunConfig:
    """Read what `dump_config` wrote: exactly that, whatever the environment says."""
    try:
        return RunConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "name the folder of a run that was started") from error
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: {_describe(error)}", "start the run anew: its configuration is damaged") from error


def _describe(error: Exception) -> str:
    """All of a refusal in one line: dotted key and reason, several parted by semicolons."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {key}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            parts.append(f"{key}: {reason}" if key else reason)
    return "; ".join(parts)
