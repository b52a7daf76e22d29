"""What is done with a run as a whole: explain it, start it, look at it, learn it again."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deskrl.core.commands.parsing import Commands, add_config, add_run, identified, read_config
from deskrl.core.config import RunConfig, load_config
from deskrl.core.errors import UserError
from deskrl.core.explain.timing import Assumptions

if TYPE_CHECKING:
    from deskrl.core.arpo import Note

_ROLES = ("replay", "learner", "inference", "actor")


def add_commands(commands: Commands) -> None:
    """Add them."""
    up = commands.add("up", "start every role of a run on this machine, watch it, and judge it at its end", _up)
    explain = commands.add(
        "explain",
        "say what a run would do, need and take, and where it departs from ARPO, before anything starts",
        _explain,
    )
    for command in (up, explain):
        add_config(command, "run configuration (TOML)")
        command.add_argument(
            "--arpo",
            action="store_true",
            help="the configuration is one of ARPO's (YAML); overrides as worker.rollout.n=8 may follow",
        )
    explain.add_argument("--json", action="store_true", help="print one JSON document")
    for name, field in Assumptions.model_fields.items():
        kind = int if field.annotation is int else float
        explain.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=field.description)
    sweep = commands.add("sweep", "run the same under several arms and seeds, and tell which did better", _sweep)
    sweep.add_argument("file", type=Path, help="sweep (TOML)")
    sweep.add_argument("--runs", type=Path, default=None, help="folder of all runs; the sweep's lies in it")
    sweep.add_argument("--dry", action="store_true", help="say what would be run, and run nothing")
    doctor = commands.add(
        "doctor", "check this machine, and a run's servers as it sees them; exit status 0: nothing to mend", _doctor
    )
    doctor.add_argument("config", type=Path, nargs="?", help="run configuration, or the folder of a run")
    doctor.add_argument(
        "--role", dest="roles", action="append", choices=_ROLES, help="that is to run here; again for more; none: all"
    )
    _add_looks(commands)


def _add_looks(commands: Commands) -> None:
    report = commands.add("report", "write report.html of a run, finished or cut short", _report, takes_overrides=False)
    view = commands.add(
        "view", "serve the episodes of a run to a browser, also while it trains", _view, takes_overrides=False
    )
    view.add_argument("--port", type=int, default=7441, help="on the loopback address; 0: a free one")
    status = commands.add(
        "status", "say how each role of a run is; exit status 0: all are well", _status, takes_overrides=False
    )
    top = commands.add(
        "top", "show throughput, latencies and learning of a run as it goes", _top, takes_overrides=False
    )
    top.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    top.add_argument("--frames", type=int, default=None, help="look so many times; unset: until Ctrl-C")
    for command in (report, view, status, top):
        add_run(command)
    again = commands.add(
        "replay-run",
        "learn again from a run's recorded batches: the same numbers, bit for bit?",
        _replay_run,
        takes_overrides=False,
    )
    add_run(again, "folder of a run that is not running")


def _up(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.up import up

    config, _ = _configure(options, overrides, must_resume=True)
    return up(identified(config, "operator"))


def _explain(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.explain.main import explain

    config, notes = _configure(options, overrides, must_resume=False)
    assumed = Assumptions(**{name: getattr(options, name) for name in Assumptions.model_fields})
    return explain(config, notes, assumed, as_document=options.json)


def _sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.sweep.main import sweep

    return sweep(options.file, overrides, options.runs, dry=options.dry)


def _configure(
    options: argparse.Namespace, overrides: Sequence[str], *, must_resume: bool
) -> tuple[RunConfig, list[Note]]:
    """The configuration of a run, and what became of ARPO's keys if it is one of ARPO's."""
    if not options.arpo:
        return load_config(options.config, overrides), []
    from deskrl.core.arpo import load_arpo

    return load_arpo(options.config, overrides, must_resume=must_resume)


def _doctor(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.doctor import doctor

    if options.config is None and overrides:
        raise UserError(f"there is nothing to override: {' '.join(overrides)}", "name a configuration")
    path = options.config / "config.json" if options.config is not None and options.config.is_dir() else options.config
    config = None if path is None else read_config(path, overrides)
    return doctor(config, options.roles or _ROLES)


def _report(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.up import report

    return report(options.run)


def _view(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return int(importlib.import_module("deskrl.replay.viewer").main(options.run, options.port))


def _status(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.status import status

    return status(options.run)


def _top(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.top import top

    return top(options.run, options.interval, options.frames)


def _replay_run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.again import replay_run

    return replay_run(options.run)
