"""Registries of the extension points: selection by name, entry point and import path, and what is rejected."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from deskrl.core.config.value_types import Section
from deskrl.core.errors import UserError
from deskrl.core.registry import Registry, missing_arguments, missing_methods, with_options


class Greeter:
    """Valid implementation with options."""

    class Options(Section):
        """Options of the greeter."""

        greeting: str = "hello"
        times: int = Field(default=1, ge=1)

    def greet(self) -> str:
        """Return a greeting."""
        return "hello"


@pytest.fixture
def registry() -> Registry[Any]:
    made: Registry[Any] = Registry(
        "greeter", "hall.greeter", "deskrl.greeters", lambda it: missing_methods(it, "greet")
    )
    made.register("polite")(Greeter)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provide an importable folder of the user's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(folder: Path, distribution: str, entry_points: str) -> None:
    """Make the metadata of an installed package with these entry points."""
    info = folder / f"{distribution}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(entry_points)


def rejection(registry: Registry[Any], name: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        registry.select(name, options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("hall.greeter") and "(hint: " in text
    return text


def test_a_built_in_is_selected_by_name_with_validated_options(registry: Registry[Any]) -> None:
    selected = registry.select("polite", {"times": 2})
    assert selected.implementation is Greeter
    assert (selected.options.greeting, selected.options.times) == ("hello", 2)


def test_an_object_is_selected_by_import_path(registry: Registry[Any], folder: Path) -> None:
    (folder / "own_greeter.py").write_text("class Own:\n    class Inner:\n        def greet(self): return 'hi'\n")
    assert registry.select("own_greeter:Own.Inner").implementation().greet() == "hi"


def test_an_entry_point_is_selected_by_its_name(registry: Registry[Any], folder: Path) -> None:
    (folder / "packaged_greeter.py").write_text("class Packaged:\n    def greet(self): return 'yo'\n")
    install(folder, "packaged", "[deskrl.greeters]\nloud = packaged_greeter:Packaged\n")
    assert registry.names() == ["loud", "polite"]
    assert registry.select("loud").implementation().greet() == "yo"


def test_a_name_that_is_taken_twice_is_rejected(registry: Registry[Any], folder: Path) -> None:
    install(folder, "one", "[deskrl.greeters]\npolite = one:Greeter\n")
    assert "the name polite is taken 2 times: by deskrl (polite) and one:Greeter" in rejection(registry, "polite")


def test_a_built_in_name_cannot_be_registered_twice(registry: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("polite")(Greeter)


SOURCES = {
    "raises:it": ("raise OSError('no screen')", "raised while it was imported: OSError: no screen"),
    "exits:it": ("raise SystemExit(3)", "raised while it was imported: SystemExit: 3"),
    "broken:it": ("def (", "raised while it was imported: SyntaxError"),
    "needs:it": ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
    "lacks:it": ("other = 1", "has no attribute 'it'"),
    "wrong:it": ("it = 7", "cannot be used as greeter: it has no method greet"),
    "attribute:it": ("import sys\nsys.no_such_thing", "raised while it was imported: AttributeError"),
}
"""Import paths with the source of their module and what the rejection says."""


@pytest.mark.parametrize("path", SOURCES)
def test_an_object_that_cannot_be_used_is_rejected_by_what_is_wrong(
    registry: Registry[Any], folder: Path, path: str
) -> None:
    source, reason = SOURCES[path]
    (folder / f"{path.partition(':')[0]}.py").write_text(source)
    assert reason in rejection(registry, path)


@pytest.mark.parametrize("path", ["no_such_module_here:it", "not a module:it", ":it", "a:", "a..b:c", "rude", ""])
def test_a_name_or_path_that_leads_nowhere_is_rejected(registry: Registry[Any], path: str) -> None:
    rejection(registry, path)


def test_invalid_options_are_rejected_by_their_dotted_path(registry: Registry[Any]) -> None:
    text = rejection(registry, "polite", {"times": 0, "volume": 3})
    assert "hall.greeter_options.times: Input should be greater than or equal to 1" in text
    assert "hall.greeter_options.volume: unknown key" in text
    assert "options of polite: greeting, times" in text


def test_options_of_an_implementation_without_any_are_rejected(registry: Registry[Any], folder: Path) -> None:
    (folder / "plain_greeter.py").write_text("class Plain:\n    def greet(self): return 'hi'\n")
    assert "has no options" in rejection(registry, "plain_greeter:Plain", {"volume": 3})


def test_the_options_of_several_implementations_can_be_in_one_table(registry: Registry[Any]) -> None:
    with pytest.raises(UserError, match=r"^hall\.tables\.polite\.times: "):
        registry.select("polite", {"times": 0}, options_key="hall.tables.polite")


def test_a_function_gets_options_by_a_decorator() -> None:
    @with_options(Greeter.Options)
    def greet(name: str, options: Greeter.Options) -> str:
        return f"{options.greeting} {name}"

    functions: Registry[Any] = Registry("function", "hall.function", "deskrl.functions", lambda found: None)
    functions.register("greet")(greet)
    selected = functions.select("greet", {"greeting": "hi"})
    assert selected.implementation("you", selected.options) == "hi you"


def test_a_function_with_other_arguments_is_recognised() -> None:
    def two(first: int, second: int) -> None: ...
    def any_number(*values: int) -> None: ...

    assert missing_arguments(two, "name", "options") is None
    assert missing_arguments(any_number, "name", "options") is None
    assert missing_arguments(two, "name") == "it does not take the arguments name"
    assert missing_arguments(7, "name") == "it cannot be called"
