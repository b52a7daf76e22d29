"""What a sweep is made of: its file, read strictly, and the cells that follow. Starts nothing.

Everything that can be known to be wrong is refused here, of every cell, before the first one starts.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from deskrl.core.config import RunConfig, Section, dotted, load_config
from deskrl.core.errors import UserError
from deskrl.core.running import preflight

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
START = "start"
_OWN_KEYS = ("name", "runs", "seed")


class SweepFile(Section):
    """A sweep as its file states it. Tables hold keys of the run configuration, as a run's file does."""

    name: Name
    """Folder of the sweep, below that of all runs."""
    title: str
    """What is asked, in a line."""
    run: Path
    """Run configuration that all cells share, beside this file."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """One cell of each arm for each of them."""
    every: dict[str, Any] = Field(default_factory=dict)
    """What every cell changes of the run configuration."""
    start: dict[str, Any] | None = None
    """With this table (empty, or what that run changes besides), the arms of a seed start from one policy: a run of its
    own does the warm start, with no update."""
    arms: Annotated[dict[Name, dict[str, Any]], Field(min_length=2)]
    """What each arm changes besides."""

    @field_validator("seeds")
    @classmethod
    def _all_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is named twice")
        return value

    @field_validator("arms")
    @classmethod
    def _start_is_no_arm(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if START in value:
            raise ValueError(f"{START} is the name of the warm starts")
        return value


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    seed: int
    path: Path
    """Run configuration."""
    options: tuple[str, ...]
    """That follow it on the command line."""
    config: RunConfig
    """What both come to."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.name

    @property
    def command(self) -> str:
        """What a person would type."""
        return shlex.join(["deskrl", "up", str(self.path), *self.options])


@dataclass(frozen=True)
class Sweep:
    """A sweep and all its cells, in the order in which they run: seed by seed, so that whatever else the machine does
    meets all arms alike."""

    file: SweepFile
    folder: Path
    cells: tuple[Cell, ...]
    env_steps: int
    """Of every arm."""

    def arm_cells(self, arm: str) -> list[Cell]:
        """One a seed."""
        return [cell for cell in self.cells if cell.arm == arm]


def read_sweep(path: Path, overrides: Sequence[str] = (), runs: Path | None = None) -> Sweep:
    """Read a sweep's file and lay out its cells.

    Args:
        path: of the file.
        overrides: of every cell, as they stand on the command line.
        runs: folder in which the sweep's lies; None: that of the run configuration.

    Raises:
        UserError: the file, or the configuration of any cell, is no good.
    """
    file = _read_file(path)
    base = (path.parent / file.run).resolve()
    folder = (runs or load_config(base).runs).absolute() / file.name
    cells = [_cell(*it, path, base, folder) for it in _layout(file, folder, _read_overrides(overrides))]
    for cell in cells:
        preflight.refuse_contradictions(cell.config)
    budgets = {cell.config.learner.grpo.env_steps for cell in cells if cell.arm != START}
    if len(budgets) > 1 or 0 in budgets:
        told = ", ".join(map(str, sorted(budgets)))
        raise UserError(
            f"{path}: arms are compared at equal environment steps, and learner.grpo.env_steps is {told}",
            "set it above 0 in the table `every`, and in no arm",
        )
    return Sweep(file, folder, tuple(cells), budgets.pop())


def _read_file(path: Path) -> SweepFile:
    try:
        return SweepFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "name a sweep, such as deploy/sweeps/replay.toml") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}", "mend the file") from error
    except ValidationError as error:
        reasons = ("{}: {}".format(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors())
        raise UserError(f"{path}: {'; '.join(reasons)}", "mend the key, or remove it") from error


def _read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of a command line, `--key value` or `--key=value`, by key."""
    found: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        key, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or (not has_value and (value := next(rest, "")) == ""):
            raise UserError(f"{argument} is no option with a value", "give keys as --learner.grpo.env_steps 600")
        found[key] = value
    return found


def _layout(file: SweepFile, folder: Path, overrides: dict[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Arm, seed and changed keys of every cell."""
    every = dict(dotted(file.every))
    for seed in file.seeds:
        begins: dict[str, Any] = {}
        if file.start is not None:
            none = {"learner.grpo.num_updates": 0, "learner.grpo.env_steps": 0, "learner.eval.episodes": 0}
            yield START, seed, every | dict(dotted(file.start)) | overrides | none
            policy = folder / cell_name(START, seed) / "checkpoints" / "epoch_0"
            begins = {"model.path": str(policy), "model.build": None, "learner.warm_start": None}
        for arm, changes in file.arms.items():
            cell = every | dict(dotted(changes)) | overrides
            # A warm start that is done has no keys left to change.
            kept = {key: value for key, value in cell.items() if not (begins and key.startswith("learner.warm_start"))}
            yield arm, seed, kept | begins


def cell_name(arm: str, seed: int) -> str:
    """Of a cell's run."""
    return f"{arm}-s{seed}"


def _cell(arm: str, seed: int, changes: Mapping[str, Any], file: Path, base: Path, folder: Path) -> Cell:
    own = {"runs": str(folder), "name": cell_name(arm, seed), "seed": seed}
    if taken := [key for key in changes if key in _OWN_KEYS]:
        raise UserError(f"{file}: {', '.join(taken)}: every cell has its own", "remove the key")
    options = [part for key, value in (own | dict(changes)).items() for part in (f"--{key}", _as_option(value))]
    try:
        config = load_config(base, options)
    except UserError as error:
        raise UserError(f"{file}: {arm}: {error.message}", error.mend) from error
    return Cell(arm, seed, base, tuple(options), config)


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
