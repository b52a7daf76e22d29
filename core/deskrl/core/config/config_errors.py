"""Conversion of pydantic's errors into one-line messages with hints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deskrl.core.addresses import AddressError
from deskrl.core.config.renamed_keys import hint_for_unknown, renamed_value
from deskrl.core.config.run import RunConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError

_DEFAULT_HINT = "correct or remove the key"


def validation_error(error: ValidationError, origin: str) -> UserError:
    """Return the error for an invalid configuration, with all invalid keys.

    Args:
        error: pydantic's error.
        origin: file that the configuration comes from.
    """
    keys, problems, hints = [], [], []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        keys.append(key)
        problems.append(describe_problem(item, key))
        is_unknown = item["type"] == "extra_forbidden"
        hints.append(hint_for_unknown(key, known_keys()) if is_unknown else _hint_for_value(key, item))
    return UserError(f"{origin}: {'; '.join(problems)}", _combine(keys, hints))


def describe_problem(item: ErrorDetails, key: str) -> str:
    """Return one of pydantic's errors as text that begins with the dotted key, if the key is not empty."""
    reason = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
    return f"{key}: {reason}" if key else reason


def unknown_option_error(arguments: Sequence[str]) -> UserError | None:
    """Return the error for options that are not keys of the configuration; None if all are keys."""
    options = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    unknown = [option for option in dict.fromkeys(options) if option not in known_keys()]
    if not unknown:
        return None
    hints = [hint_for_unknown(option, known_keys()) for option in unknown]
    return UserError("; ".join(f"{option}: unknown key" for option in unknown), _combine(unknown, hints))


def unparsable_value_error(message: str, arguments: Sequence[str]) -> UserError:
    """Return the error for a list or table that is not valid JSON, with the options and variables that may contain it.

    Args:
        message: message of pydantic-settings, which names only the section.
        arguments: command-line options.
    """
    named = re.search(r'field "(\w+)"', message)
    if named is None:
        return UserError(one_line(message), "correct or remove the option")
    section = named[1]
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith(f"--{section}")]
    variables = [name for name in os.environ if name.upper().startswith(f"DESKRL_{section.upper()}")]
    names = ", ".join(dict.fromkeys([*(option[2:] for option in options), *variables])) or section
    return UserError(f"{names}: not a list or table in JSON, such as [0, 1]", "correct or remove the option")


def known_keys() -> set[str]:
    """Return the dotted names of all keys and sections of the configuration."""
    return set(_keys_of(RunConfig, ""))


def table_keys() -> set[str]:
    """Return the dotted names of all keys that are tables with free keys."""
    return set(_keys_of(RunConfig, "", of_tables=True))


def _keys_of(schema: type[BaseModel], prefix: str, *, of_tables: bool = False) -> Iterator[str]:
    """Yield the dotted keys of a schema, or only those of its tables with free keys."""
    for name, field in schema.model_fields.items():
        is_table = get_origin(field.annotation) is dict
        if is_table or not of_tables:
            yield prefix + name
        for kind in () if is_table else (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys_of(kind, f"{prefix}{name}.", of_tables=of_tables)


def _hint_for_value(key: str, item: ErrorDetails) -> str | None:
    """Return the hint of the exception that rejected a value, or the value's new name; None if there is neither."""
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, AddressError):
        return cause.hint
    value = item["input"]
    new_value = renamed_value(key, value)
    return f"{value} was renamed to {new_value}" if new_value else None


def _combine(keys: Sequence[str], hints: Sequence[str | None]) -> str:
    """Return one hint for all keys; several hints are preceded by their keys."""
    if len(keys) == 1:
        return hints[0] or _DEFAULT_HINT
    specific = [f"{key}: {hint}" for key, hint in zip(keys, hints, strict=True) if hint]
    return "; ".join(specific) if specific else "correct or remove these keys"
