"""Type, default and meaning of every key of the configuration, read from its schema, and their help for a terminal."""

from __future__ import annotations

import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from deskrl.core.addresses import HostPort
from deskrl.core.config import RunConfig

_LARGEST_STATED_BOUND = 1_000_000
"""Upper bounds from here on exclude only values that engines cannot represent, and are not stated."""
_KINDS = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "path", HostPort: "host:port"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_GIB = 1024**3


@dataclass(frozen=True)
class ConfigurationKey:
    """One key of the configuration."""

    name: str
    """Dotted name."""
    kind: str
    """Type in words, with bounds."""
    default: str
    """Default in TOML; `unset` if there is none, `required` if a value must be given."""
    size: str
    """A default of a GiB or more in GiB; otherwise empty."""
    meaning: str


@dataclass(frozen=True)
class ConfigurationSection:
    """One section of the configuration with its keys, without those of the sections below it."""

    name: str
    """Dotted name; empty for the keys outside of all sections."""
    meaning: str
    keys: tuple[ConfigurationKey, ...]
    are_options: bool = True
    """Whether each name of a key is an option as it is; below a name of the user's own, it is one with that name."""


def configuration_sections() -> list[ConfigurationSection]:
    """Return all sections in the order of the schema; a section comes before the sections below it."""
    return list(_sections("", RunConfig, None, "Keys outside of all sections."))


def option_section(name: str, meaning: str, schema: type[BaseModel]) -> ConfigurationSection:
    """Return the keys of an implementation's options as a section.

    Args:
        name: name of the section.
        meaning: description of the section.
        schema: class of the options, without sections below it.
    """
    (section,) = _sections(name, schema, None, meaning, are_options=False)
    return section


def keys_help(width: int) -> str:
    """Return the keys with type, default and meaning as text for a terminal.

    Args:
        width: maximum length of a line in characters.
    """
    lines = textwrap.wrap("keys of the configuration, as options (in TOML: desktop.num_envs = 4):", width)
    for section in configuration_sections():
        if section.name:
            lines += ["", *textwrap.wrap(f"[{section.name}] {section.meaning}", width)]
        for key in section.keys:
            name = f"--{key.name}" if section.are_options else key.name
            title = f"{name}  {key.kind}; default: {key.default} {key.size}"
            lines += textwrap.wrap(title, width, initial_indent="  ", subsequent_indent=" " * 8, break_on_hyphens=False)
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _sections(
    name: str, schema: type[BaseModel], values: BaseModel | None, meaning: str, *, are_options: bool = True
) -> Iterator[ConfigurationSection]:
    """Yield a section and those below it.

    Args:
        name: dotted name of the section.
        schema: schema of its keys.
        values: its default; None: the defaults are those of the schema.
        meaning: description of the section.
        are_options: whether its keys are options.
    """
    keys: list[ConfigurationKey] = []
    below: list[Iterator[ConfigurationSection]] = []
    for key, field in schema.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        default = getattr(values, key) if values is not None else field.get_default(call_default_factory=True)
        table, is_named = _section_of(field.annotation)
        if table is None or is_named:
            kind = _kind(field.annotation, _bounds(field.metadata))
            described = _one_line(field.description)
            shown = "required" if values is None and field.is_required() else _toml(default)
            keys.append(ConfigurationKey(dotted, kind, shown, _size(dotted, default), described))
        if table is not None:
            text = _section_meaning(table, is_unset=default is None, is_named=is_named)
            inner, inner_default = (f"{dotted}.NAME", None) if is_named else (dotted, default)
            below.append(_sections(inner, table, inner_default, text, are_options=are_options and not is_named))
    yield ConfigurationSection(name, meaning, tuple(keys), are_options)
    for sections in below:
        yield from sections


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the schema of a key that is a section, or a table of sections by name, and whether it is the latter."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind, get_origin(annotation) is dict
    return None, False


def _section_meaning(table: type[BaseModel], *, is_unset: bool, is_named: bool) -> str:
    meaning = _one_line(table.__doc__)
    if is_named:
        return f"{meaning} `NAME` is a name of your own. Each key is an option with this name in it."
    if is_unset:
        return f"{meaning} The section is unset by default; the defaults below apply once one of its keys is set."
    return meaning


def _kind(annotation: Any, bounds: str = "") -> str:
    """Return a type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0], _bounds(arguments[1:]) or bounds)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one, bounds) for one in arguments if one is not type(None))
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is tuple:
        return f"list of {_plural(_kind(arguments[0]))}"
    if origin is dict or annotation is dict:
        return "table"
    name = _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())
    return f"{name} {bounds}".strip()


def _plural(kind: str) -> str:
    noun, space, rest = kind.partition(" ")
    return kind if noun == "host:port" else f"{noun}s{space}{rest}"


def _bounds(metadata: Sequence[Any]) -> str:
    stated = []
    for constraint in metadata:
        inner = get_args(constraint)[1:] or getattr(constraint, "metadata", None) or (constraint,)
        for one in inner:
            for attribute, sign in _BOUNDS.items():
                bound = getattr(one, attribute, None)
                if bound is not None and not (sign == "<=" and bound >= _LARGEST_STATED_BOUND):
                    stated.append(f"{sign} {bound:g}")
    return ", ".join(stated)


def _toml(value: Any) -> str:
    """Return a value as in TOML."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, BaseModel):
        return _toml(value.model_dump(exclude_unset=True))
    if isinstance(value, dict):
        entries = ", ".join(f"{key} = {_toml(one)}" for key, one in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    return json.dumps(str(value), ensure_ascii=False)


def _size(name: str, value: Any) -> str:
    is_large = name.endswith("_bytes") and isinstance(value, int) and value >= _GIB
    return f"({value / _GIB:g} GiB)" if is_large else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
