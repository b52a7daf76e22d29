"""Entry point of the command line: runs one command and reports errors of the user in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from deskrl.cli import data_commands, role_commands, run_commands, run_management_commands, task_commands
from deskrl.cli.arguments import Commands, Parser, join_overrides
from deskrl.core.errors import UserError, missing_package
from deskrl.core.foreign_variables import drop_foreign_variables

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2, with one line on standard error, for an error of the user.

    Args:
        arguments: command-line arguments; None: those of this process.
    """
    # gRPC's core would log to standard error as well. It reads this variable once, when `grpc` is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    drop_foreign_variables()
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except UserError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        problem = f"{error.filename}: cannot be written: " if error.filename else ""
        hint = "free some space and run the same command again; acknowledged data is not lost"
        return _report(UserError(f"{problem}the disk is full", hint))
    except KeyboardInterrupt:
        return 130


def _report(error: UserError) -> int:
    """Print the error as one line, even if the message of an engine has several, and return the exit status."""
    line = " ".join(["deskrl:", *str(error).split()])
    with contextlib.suppress(OSError):  # standard error of a role may be a file on the full disk
        # One write: torchrun runs its ranks unbuffered, and ranks that fail together share standard error.
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    return 2


def build_parser() -> tuple[Parser, Commands]:
    """Return the parser of the command line, and its commands."""
    parser = Parser(
        prog="deskrl",
        description="Train computer-use agents by reinforcement learning on real desktops.",
        epilog="Every key of the configuration can be set as an option: deskrl up CONFIG --learner.grpo.num_updates 20",
    )
    commands = Commands(parser, "command")
    for module in (run_commands, run_management_commands, data_commands, task_commands, role_commands):
        module.add_commands(commands)
    return parser, commands


def _dispatch(arguments: Sequence[str]) -> int:
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-"):
        commands.check_name(arguments[0])
    options, rest = parser.parse_known_args(join_overrides(arguments))
    if rest and not options.takes_overrides:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return int(options.perform(options, rest))
    except ModuleNotFoundError as error:  # engines are imported only when they are needed
        if error.name is None or error.name.startswith("deskrl"):
            raise
        raise missing_package(error.name, options.role) from error


if __name__ == "__main__":
    sys.exit(main())
