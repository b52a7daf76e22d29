"""Registries of the extension points: built-in implementations, those of installed packages, and import paths."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from deskrl.core.config.config_errors import describe_problem
from deskrl.core.config.renamed_keys import renamed_value
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError

T = TypeVar("T")
Registered = TypeVar("Registered")

_MAX_REASON_CHARACTERS = 300
_IMPORT_HINT = "install its package, or put its folder on PYTHONPATH; the form is package.module:object"


@cache
def _installed_entry_points(search_path: tuple[str, ...]) -> Any:  # its type depends on the version of Python
    """Return the entry points on a search path, read once: the metadata of all installed packages is searched."""
    from importlib.metadata import entry_points  # slow to import

    return entry_points()


@dataclass(frozen=True)
class Extension(Generic[T]):
    """Selected implementation of an extension point."""

    name: str
    """Name or import path in the configuration."""
    implementation: T
    options: Any
    """Instance of the implementation's attribute `Options`; None if it has none."""


class Registry(Generic[T]):
    """Implementations of one extension point by name.

    Built-in implementations are registered when the module of the registry is imported, so they import engines only in
    their bodies. Other packages provide theirs as entry points, which are loaded when they are selected. Any importable
    object is selected by `package.module:object`.

    An implementation may have an attribute `Options`, a pydantic model of its own configuration.

    Args:
        kind: what an implementation is, for messages: "desktop provider".
        key: configuration key that selects an implementation: "desktop.provider".
        group: entry-point group: "deskrl.desktops".
        find_problem: returns why an object is not an implementation ("has no method start"), or None.
    """

    def __init__(self, kind: str, key: str, group: str, find_problem: Callable[[Any], str | None]) -> None:
        self.kind = kind
        self.key = key
        self.group = group
        self._find_problem = find_problem
        self._built_in: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a built-in implementation; raises ValueError if the name is taken."""

        def add(implementation: Registered) -> Registered:
            if name in self._built_in:
                raise ValueError(f"{self.kind} {name} is registered twice")
            if problem := self._find_problem(implementation):
                raise ValueError(f"{self.kind} {name}: {problem}")
            self._built_in[name] = implementation  # type: ignore[assignment]  # checked by find_problem
            return implementation

        return add

    def names(self) -> list[str]:
        """Return the names of the built-in implementations and of those of installed packages, sorted."""
        return sorted({*self._built_in, *self._entry_points})

    def select(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        options_key: str | None = None,
    ) -> Extension[T]:
        """Return an implementation with its options.

        Args:
            name: name, or import path `package.module:object`.
            options: values of the implementation's own configuration.
            key: configuration key that holds `name`, if it is not the registry's.
            options_key: configuration key that holds `options`, if it is not `<key>_options`.

        Raises:
            UserError: the name is unknown or taken twice; the object cannot be imported, is not an implementation,
                or rejects the options.
        """
        key = key or self.key
        implementation = self.load(name, key)
        options_key = options_key or f"{key}_options"
        return Extension(name, implementation, self._validate(name, implementation, options or {}, options_key))

    def load(self, name: str, key: str | None = None) -> T:
        """Return an implementation; arguments and errors as for `select`."""
        key = key or self.key
        found = self._import(name, key) if ":" in name else self._find_by_name(name, key)
        if problem := self._find_problem(found):
            raise UserError(
                f"{key}: {name} cannot be used as {self.kind}: {problem}",
                "see docs/extending.md; deskrl.testing has a suite that checks your own",
            )
        return found  # type: ignore[no-any-return]  # checked by find_problem

    def _find_by_name(self, name: str, key: str) -> Any:
        provided = self._entry_points.get(name, [])
        if name in self._built_in:
            provided = [f"deskrl ({name})", *provided]
        if len(provided) > 1:
            raise UserError(
                f"{key}: the name {name} is taken {len(provided)} times: by {' and '.join(provided)}",
                f"remove one of the packages, or select one as {provided[-1]}",
            )
        if name in self._built_in:
            return self._built_in[name]
        if not provided:
            hint = f"choose one of {', '.join(self.names())}, or your own as package.module:object"
            if new_name := renamed_value(key, name):
                hint = f"{name} was renamed to {new_name}"
            raise UserError(f"{key}: unknown {self.kind} {name!r}", hint)
        return self._import(provided[0], key)

    @cached_property
    def _entry_points(self) -> dict[str, list[str]]:
        """Import paths by name."""
        found: dict[str, list[str]] = {}
        for entry in _installed_entry_points(tuple(sys.path)).select(group=self.group):
            values = found.setdefault(entry.name, [])
            if entry.value not in values:  # an editable installation lists its entry points twice
                values.append(entry.value)
        return found

    def _import(self, path: str, key: str) -> Any:
        module_name, _, object_path = path.partition(":")
        if not all(part.isidentifier() for part in (*module_name.split("."), *object_path.split("."))):
            raise UserError(f"{key}: {path!r} is not an import path", "write it as package.module:object")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # last, so that no file there replaces an installed module
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"{key}: {path} cannot be imported: {error}", _IMPORT_HINT) from error
        except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
            reason = typed_line(error, _MAX_REASON_CHARACTERS)
            raise UserError(f"{key}: {path} raised while it was imported: {reason}", "correct the module") from error
        try:
            for part in object_path.split("."):
                found = getattr(found, part)
        except AttributeError as error:
            raise UserError(f"{key}: {path}: {error}", f"name an object that {module_name} defines") from error
        return found

    def _validate(self, name: str, implementation: T, options: Mapping[str, Any], key: str) -> Any:
        schema = getattr(implementation, "Options", None)
        if schema is None:
            if options:
                raise UserError(f"{key}.{next(iter(options))}: {name} has no options", f"remove {key}")
            return None
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise UserError(f"{self.kind} {name}: its Options is not a pydantic model", "derive it from Section")
        try:
            return schema.model_validate(dict(options))
        except ValidationError as error:
            problems = [
                describe_problem(item, ".".join([key, *(str(part) for part in item["loc"])])) for item in error.errors()
            ]
            known = ", ".join(schema.model_fields) or "none"
            raise UserError("; ".join(problems), f"options of {name}: {known}") from error


def with_options(schema: type[BaseModel]) -> Callable[[Registered], Registered]:
    """Return a decorator that sets the attribute `Options` of a function; a class defines it in its body.

    Args:
        schema: pydantic model of the function's options.
    """

    def add(function: Registered) -> Registered:
        function.Options = schema  # type: ignore[attr-defined]  # functions accept any attribute
        return function

    return add


def subclass_problem(found: Any, base: type) -> str | None:
    """Return why an object is not a concrete subclass of an abstract class, for `find_problem`; None if it is one."""
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"it is not a class derived from {base.__module__}.{base.__name__}"
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    return f"it does not define {', '.join(missing)}" if missing else None


def missing_arguments(found: Any, *names: str) -> str | None:
    """Return that an object cannot be called with these positional arguments, for `find_problem`; None if it can."""
    if not callable(found):
        return "it cannot be called"
    try:
        inspect.signature(found).bind(*names)
    except TypeError:
        return f"it does not take the arguments {', '.join(names)}"
    except ValueError:  # a function in C without a signature
        return None
    return None


def missing_methods(found: Any, *names: str) -> str | None:
    """Return which of these methods an object lacks, for `find_problem`; None if it has them all."""
    missing = [name for name in names if not callable(getattr(found, name, None))]
    return f"it has no method {', '.join(missing)}" if missing else None
