"""Benchmark of desktops: requirements are named at once, and it runs in a clone below /tmp."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_desktop", REPOSITORY / "tests" / "bench" / "desktop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_desktop"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare_machine(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of all programs of a machine that has none, with a Python without the needed modules."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(bench, "SYSTEM_PYTHON", str(programs / "python3"))
    return programs


def add_program(folder: Path, name: str, text: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_all_missing_packages_are_named_in_one_line(bench: ModuleType, bare_machine: Path) -> None:
    with pytest.raises(SystemExit) as end:
        bench.check_requirements()
    everything = {*bench.PROGRAMS.values(), *bench.MODULES.values(), "python3"}
    line = str(end.value)
    assert "\n" not in line and line.count("apt-get install") == 1
    assert set(line.partition("apt-get install ")[2].rstrip(")").split()) == everything


def test_only_the_missing_modules_are_named_if_the_programs_exist(bench: ModuleType, bare_machine: Path) -> None:
    for name in bench.PROGRAMS:
        add_program(bare_machine, name)
    add_program(bare_machine, "python3", "echo pyatspi tkinter")
    with pytest.raises(SystemExit, match=r"apt-get install python3-pyatspi python3-tk\)"):
        bench.check_requirements()
    add_program(bare_machine, "python3", "echo")
    bench.check_requirements()


def test_what_the_benchmark_needs_stays_visible_below_tmp_and_run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPOSITORY", Path("/tmp/clone"))
    monkeypatch.setattr(sys, "prefix", "/run/environment")
    arguments = bench.visible_arguments(Path("/tmp/server"))
    shown = {arguments[index + 1] for index in range(0, len(arguments), 3)}
    assert {"/tmp/clone", "/tmp/server", "/run/environment"} <= shown
    monkeypatch.setattr(bench, "REPOSITORY", Path("/home/user/clone"))
    monkeypatch.setattr(sys, "prefix", "/home/user/clone/.venv")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert bench.visible_arguments(Path("/srv/server")) == []
