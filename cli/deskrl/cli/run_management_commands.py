"""Commands for the runs of a folder: list, stop and delete them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deskrl.cli.arguments import Commands, add_run
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    runs = commands.add_level("runs", "list, stop and delete runs")
    listing = runs.add(
        "list", "list the runs and evaluations of a folder, the newest last", _list, role="actor", takes_overrides=False
    )
    # Not of an instance, which reads the environment: an invalid variable would break all commands.
    default = RunConfig.model_fields["runs"].default
    listing.add_argument("folder", type=Path, nargs="?", default=default, help="directory of runs")
    listing.add_argument("--json", action="store_true", help="print one JSON document")
    stop = runs.add(
        "stop",
        "stop a run of this machine in good order, as Ctrl-C does, and wait for its end",
        _stop,
        role="actor",
        takes_overrides=False,
    )
    delete = runs.add(
        "delete", "delete the directory of a run that is not running", _delete, role="actor", takes_overrides=False
    )
    delete.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    for command in (stop, delete):
        add_run(command)


def _list(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.runs_list import list_runs

    return list_runs(options.folder, as_document=options.json)


def _stop(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.run_control import stop_run

    stop_run(options.run)
    print(f"stopped {options.run} (hint: the command that started it resumes it)")
    return 0


def _delete(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.formatting import format_size
    from deskrl.launch.run_control import check_not_running, check_run_directory, delete_run

    folder = check_run_directory(options.run)
    check_not_running(folder)
    if not options.yes and not _confirm(options.run):
        print("nothing was deleted")
        return 1
    num_bytes = delete_run(options.run)
    print(f"deleted {options.run}: {num_bytes} bytes freed ({format_size(num_bytes)})")
    return 0


def _confirm(run: Path) -> bool:
    """Ask on the terminal whether to delete a run.

    Raises:
        UserError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UserError("deletion is not confirmed: standard input is not a terminal", "add --yes")
    return input(f"Delete {run} with all of its checkpoints and episodes? [y/N] ").strip().lower() in ("y", "yes")
