"""The wheel: it contains every file of the packages, and its commands run outside of a clone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from wheel_kit import ROOT, Installation, build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installation"), wheel)


def test_the_wheel_contains_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for path in ROOT.glob("*/deskrl/**/*") if path.is_file() and "__pycache__" not in path.parts]
    # Relative to the parent of `deskrl`, as an import sees them. Stubs are generated during the build.
    expected = {str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0])) for path in files}
    assert sorted(expected - names) == []
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_modules_are_those_of_the_wheel(installation: Installation) -> None:
    program = (
        "import deskrl.cli.main as main, deskrl.proto.v1.replay_pb2 as stub; print(main.__file__); print(stub.__file__)"
    )
    outcome = installation.run("python", "-c", program)
    assert outcome.returncode == 0, outcome.stdout
    assert all(line.startswith(str(installation.packages)) for line in outcome.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Train computer-use agents"),
        (["explain", "{share}/runs/arpo-full.toml"], "ARPO"),
        (["tasks", "check", "{packages}/deskrl/actor/suite/all.json"], "press-and-submit"),
    ],
)
def test_a_command_runs_outside_of_the_clone(installation: Installation, arguments: list[str], shown: str) -> None:
    paths = {"share": str(installation.share), "packages": str(installation.packages)}
    outcome = installation.run("deskrl", *(argument.format(**paths) for argument in arguments))
    assert outcome.returncode == 0, outcome.stdout
    assert shown in outcome.stdout
