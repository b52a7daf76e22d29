"""The command line: parses, performs the one command that was asked for, and tells a person what went wrong.

Knows no command: those are in `commands`, and import what they need only once they are performed, so that
`deskrl --help` and a refused configuration answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from deskrl.core.commands import roles, runs, tasks
from deskrl.core.commands.parsing import Commands, Parser
from deskrl.core.errors import UserError, missing_package

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Bad input is one line on standard error and status 2."""
    # gRPC's core would write lines of its own beside that one. It looks once, as `grpc` is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = f"; {error.filename} could not be written" if error.filename else ""
        mend = "free some space and give the same command again; nothing that was acknowledged is lost"
        return _refuse(UserError(f"the disk is full{where}", mend))
    except KeyboardInterrupt:
        return 130


def _refuse(error: UserError) -> int:
    """Tell a person, in one line whatever an engine's message held."""
    line = " ".join(["deskrl:", *str(error).split()])
    with contextlib.suppress(OSError):  # the log of a role may lie on the disk that is full
        # In one write: torchrun runs its ranks unbuffered, and those that refuse together share standard error.
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    return 2


def _dispatch(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="deskrl",
        description="Train computer-use agents by reinforcement learning on real desktops.",
        epilog="Any key of the configuration is an option too: deskrl up CONFIG --learner.grpo.num_updates 20",
    )
    commands = Commands(parser, "command")
    for module in (runs, tasks, roles):
        module.add_commands(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return int(options.perform(options, rest))
    except ModuleNotFoundError as error:  # wherever it is imported: engines only when they are needed
        if error.name is None or error.name.startswith("deskrl"):
            raise
        raise missing_package(error.name, options.role) from error


if __name__ == "__main__":
    sys.exit(main())
