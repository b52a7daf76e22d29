"""Configuration of a sweep: its file, and the runs that follow from it.

The configurations of all runs are checked before the first one starts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from deskrl.actor.extensions import check_extensions
from deskrl.core.config import RunConfig, Section, dotted, load_config
from deskrl.core.config.toml_file import invalid_keys_error, read_toml
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch import preflight

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
START = "start"
_OWN_KEYS = ("name", "runs", "seed")


class SweepFile(Section):
    """Content of a sweep file. Its tables contain keys of the run configuration, like the file of a run."""

    name: Name
    """Name of the sweep's directory, below that of all runs."""
    title: str
    """Question that the sweep answers, in one line."""
    run: Path
    """Run configuration that all runs share, relative to this file."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds; each arm has one run per seed."""
    every: dict[str, Any] = Field(default_factory=dict)
    """Changes to the run configuration in every run."""
    start: dict[str, Any] | None = None
    """If set, a run without updates does the warm start of each seed, and all arms of the seed start from its policy.
    The table has the changes of this run and may be empty."""
    arms: Annotated[dict[Name, dict[str, Any]], Field(min_length=2)]
    """Further changes of each arm."""

    @field_validator("seeds")
    @classmethod
    def _check_unique(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a seed occurs twice")
        return value

    @field_validator("arms")
    @classmethod
    def _check_arm_names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if START in value:
            raise ValueError(f"{START} is reserved for the warm starts")
        return value


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: an arm with a seed."""

    arm: str
    seed: int
    path: Path
    """Run configuration file."""
    options: tuple[str, ...]
    """Command line options that follow the file."""
    config: RunConfig
    """Configuration that results from file and options."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name

    @property
    def run_dir(self) -> RunDir:
        """Directory of the run."""
        return RunDir(self.config.run_dir)

    @property
    def command(self) -> str:
        """Equivalent shell command."""
        return shlex.join(["deskrl", "up", str(self.path), *self.options])


@dataclass(frozen=True)
class Sweep:
    """A sweep and its runs, in execution order: seed by seed, so that changing load affects all arms alike."""

    file: SweepFile
    root: Path
    """Directory of the sweep."""
    runs: tuple[SweepRun, ...]
    env_steps: int
    """Environment steps at which all arms are compared."""

    def runs_of_arm(self, arm: str) -> list[SweepRun]:
        """Return the runs of an arm, one per seed."""
        return [run for run in self.runs if run.arm == arm]


def read_sweep(path: Path, overrides: Sequence[str] = (), runs: Path | None = None) -> Sweep:
    """Read a sweep file and configure its runs.

    Args:
        path: sweep file.
        overrides: command line options for every run.
        runs: parent directory of the sweep; None for that of the run configuration.

    Raises:
        UserError: the file, or the configuration of a run, is invalid.
    """
    file = _read_file(path)
    base = (path.parent / file.run).resolve()
    root = (runs or load_config(base).runs).absolute() / file.name
    changes = _layout(file, root, _read_overrides(overrides))
    sweep_runs = [_make_run(*run_changes, path, base, root) for run_changes in changes]
    for run in sweep_runs:
        preflight.check_consistency(run.config)
        check_extensions(run.config)
    budgets = {run.config.learner.grpo.max_env_steps for run in sweep_runs if run.arm != START}
    if len(budgets) > 1 or 0 in budgets:
        listed = ", ".join(map(str, sorted(budgets)))
        raise UserError(
            f"{path}: arms are compared at equal environment steps, but learner.grpo.max_env_steps is {listed}",
            "set it to a value above 0 in the table `every`, and in no arm",
        )
    return Sweep(file, root, tuple(sweep_runs), budgets.pop())


def _read_file(path: Path) -> SweepFile:
    values = read_toml(path, "name a sweep file, such as deploy/sweeps/replay.toml")
    try:
        return SweepFile.model_validate(values)
    except ValidationError as error:
        if values.keys() <= RunConfig.model_fields.keys():
            hint = f"start it with deskrl up {path}, or name a sweep file, such as deploy/sweeps/replay.toml"
            raise UserError(f"{path}: is a run configuration, not a sweep configuration", hint) from error
        raise invalid_keys_error(error, path) from error


def _read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of command line options (`--key value` or `--key=value`) by key."""
    values: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        key, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or (not has_value and (value := next(rest, "")) == ""):
            raise UserError(
                f"{argument}: must be an option with a value", "for example --learner.grpo.max_env_steps 600"
            )
        values[key] = value
    return values


def _layout(file: SweepFile, root: Path, overrides: dict[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield arm, seed and changed keys of every run."""
    every = dict(dotted(file.every))
    for seed in file.seeds:
        start_keys: dict[str, Any] = {}
        if file.start is not None:
            no_updates = {
                "learner.grpo.num_updates": 0,
                "learner.grpo.max_env_steps": 0,
                "learner.eval.num_episodes": 0,
            }
            yield START, seed, every | dict(dotted(file.start)) | overrides | no_updates
            policy = root / run_name(START, seed) / "checkpoints" / "epoch_0"
            start_keys = {"model.path": str(policy), "model.build": None, "learner.warm_start": None}
        for arm, changes in file.arms.items():
            run_keys = every | dict(dotted(changes)) | overrides
            # The warm start is done by the start run, so its keys do not apply to an arm.
            kept = {
                key: value
                for key, value in run_keys.items()
                if not (start_keys and key.startswith("learner.warm_start"))
            }
            yield arm, seed, kept | start_keys


def run_name(arm: str, seed: int) -> str:
    """Return the name of a run."""
    return f"{arm}-s{seed}"


def _make_run(arm: str, seed: int, changes: Mapping[str, Any], file: Path, base: Path, root: Path) -> SweepRun:
    own = {"runs": str(root), "name": run_name(arm, seed), "seed": seed}
    if reserved := [key for key in changes if key in _OWN_KEYS]:
        raise UserError(f"{file}: {', '.join(reserved)}: set by the sweep for each run", "remove the key")
    options = [part for key, value in (own | dict(changes)).items() for part in (f"--{key}", _as_option(value))]
    try:
        config = load_config(base, options)
    except UserError as error:
        raise UserError(f"{file}: {arm}: {error.message}", error.hint) from error
    return SweepRun(arm, seed, base, tuple(options), config)


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
