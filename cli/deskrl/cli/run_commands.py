"""Commands for a whole run: pretrain, start, explain, sweep, diagnose, monitor, report and reproduce it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from deskrl.analysis.explain.update_time import Assumptions
from deskrl.cli.arguments import Commands, add_config, add_run, number, read_config, with_identity, with_run
from deskrl.core.config import RunConfig, keys_of_file, load_config, overridden_keys
from deskrl.core.config.value_types import Port, PositiveInt, PositiveSeconds
from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from deskrl.launch.arpo import Note

_ROLES = ("replay", "learner", "inference", "actor")


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    up = commands.add(
        "up",
        "start a run with all of its roles on this machine, monitor it, and check its acceptance criteria at the end",
        _up,
    )
    explain = commands.add(
        "explain",
        "print what a run will do, need and cost, and how it differs from ARPO, without starting it",
        _explain,
    )
    for command in (up, explain):
        add_config(command, "run configuration (TOML, or YAML with --arpo)")
        command.add_argument(
            "--arpo",
            action="store_true",
            help="CONFIG is an ARPO configuration (YAML); ARPO's overrides, such as worker.rollout.n=8, are accepted",
        )
    explain.add_argument("--json", action="store_true", help="print one JSON document")
    for name, field in Assumptions.model_fields.items():
        kind = number(Annotated[field.annotation, Field(), *field.metadata])
        explain.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=field.description)
    sweep = commands.add("sweep", "run several arms with several seeds and compare them", _sweep)
    sweep.add_argument("file", type=Path, help="sweep configuration (TOML)")
    sweep.add_argument(
        "--runs",
        type=Path,
        default=None,
        help="directory of all runs, which contains that of the sweep; unset: `runs` of the configuration",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the runs of the sweep without starting them")
    pretrain = commands.add(
        "pretrain",
        "pretrain a small policy on synthetic screens, or continue a pretraining that was interrupted",
        _pretrain,
        role="learner",
        takes_overrides=False,
    )
    pretrain.add_argument("config", type=Path, help="pretraining configuration (TOML)")
    doctor = commands.add(
        "doctor",
        "check this machine, and the connection to the servers of a run; exit status 0 if there is nothing to fix",
        _doctor,
    )
    doctor.add_argument(
        "config", type=Path, nargs="?", help="run configuration, or run directory; unset: check this machine only"
    )
    doctor.add_argument(
        "--role",
        dest="roles",
        action="append",
        choices=_ROLES,
        help="role that is to run on this machine; may be repeated; unset: all roles",
    )
    _add_monitoring(commands)


def _add_monitoring(commands: Commands) -> None:
    report = commands.add(
        "report", "write report.html of a run, finished, interrupted or in progress", _report, takes_overrides=False
    )
    view = commands.add(
        "view", "serve a web page with the episodes of a run, also while it is running", _view, takes_overrides=False
    )
    view.add_argument("--port", type=number(Port), default=7441, help="port on the loopback address; 0: a free port")
    watch = commands.add(
        "watch",
        "serve a web page with the desktops of a running run, live and read-only",
        _watch,
        takes_overrides=False,
    )
    watch.add_argument("--port", type=number(Port), default=7442, help="port on the loopback address; 0: a free port")
    status = commands.add(
        "status",
        "print the status of each role of a run; exit status 0 if all are healthy",
        _status,
        takes_overrides=False,
    )
    top = commands.add(
        "top", "show throughput, latencies and learning curves of a run live", _top, takes_overrides=False
    )
    top.add_argument("--interval", type=number(PositiveSeconds), default=2.0, help="seconds between refreshes")
    top.add_argument(
        "--frames", type=number(PositiveInt), default=None, help="number of refreshes; unset: until Ctrl-C"
    )
    for command in (report, view, watch, status, top):
        add_run(command)
    reproduce = commands.add(
        "reproduce",
        "train again on the recorded batches of a run and compare all numbers bit for bit",
        _reproduce,
        takes_overrides=False,
    )
    add_run(reproduce, "run directory of a run that is not running")


def _up(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.report.report_page import write_report
    from deskrl.launch.up import up

    config, _ = _configure(options, overrides, must_resume=True)
    set_keys = overridden_keys(overrides) | (set() if options.arpo else keys_of_file(options.config))
    return up(with_identity(config, "operator"), write_report, set_keys)


def _explain(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.explain.main import explain

    config, notes = _configure(options, overrides, must_resume=False)
    assumed = Assumptions(**{name: getattr(options, name) for name in Assumptions.model_fields})
    return explain(config, notes, assumed, as_document=options.json)


def _sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.sweep.main import sweep

    return sweep(options.file, overrides, options.runs, dry=options.dry_run)


def _pretrain(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core import console
    from deskrl.learner.pretraining.main import pretrain

    console.set_up_logging("pretrain")
    return pretrain(options.config)


def _configure(
    options: argparse.Namespace, overrides: Sequence[str], *, must_resume: bool
) -> tuple[RunConfig, list[Note]]:
    """Return the configuration, and notes on how each key of an ARPO configuration was translated."""
    if not options.arpo:
        return load_config(options.config, overrides), []
    from deskrl.launch.arpo import load_arpo

    return load_arpo(options.config, overrides, must_resume=must_resume)


def _doctor(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.doctor import doctor
    from deskrl.launch.port_assignment import assignable_keys

    if options.config is None and overrides:
        raise UserError(f"options without a configuration to override: {' '.join(overrides)}", "give a configuration")
    path = options.config / "config.json" if options.config is not None and options.config.is_dir() else options.config
    if path is None:
        return doctor(None, options.roles or _ROLES)
    config = with_run(read_config(path, overrides))
    chosen_keys: frozenset[str] = frozenset()  # a resolved configuration has the ports that were chosen
    if path.suffix != ".json":
        chosen_keys = assignable_keys(config, overridden_keys(overrides) | keys_of_file(path))
    return doctor(config, options.roles or _ROLES, chosen_keys)


def _report(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.report.report_page import report

    return report(options.run)


def _view(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.viewer import view

    return view(options.run, options.port)


def _watch(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.viewer import watch

    return watch(options.run, options.port)


def _status(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.status import status

    return status(options.run)


def _top(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.top import top

    return top(options.run, options.interval, options.frames)


def _reproduce(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.reproduce_run import reproduce

    return reproduce(options.run)
