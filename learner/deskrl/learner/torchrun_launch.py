"""Starts several learner ranks on this machine with torchrun and maps their exit statuses to one."""

from __future__ import annotations

from collections.abc import Sequence

from deskrl.core.process_lifecycle import STOPPED_STATUS

_INVALID_INPUT = 2
"""Exit status of a rank that rejected its input (UserError)."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun and return the exit status: 0 if all ranks succeeded, 2 if one rejected its input, else 1.

    SIGTERM and SIGINT are forwarded to the ranks; once they have stopped, the status is `STOPPED_STATUS`, as for a
    single rank.

    Args:
        arguments: command-line arguments of torchrun.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        return _INVALID_INPUT if any(failure.exitcode == _INVALID_INPUT for failure in error.failures.values()) else 1
    except SignalException:
        return STOPPED_STATUS
    return 0
