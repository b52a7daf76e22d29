"""Several ranks of the learner on this machine: torchrun, with an exit status that tells a refusal from a crash.

Knows how processes are started and end; knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

_REFUSED = 2


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; 0 once all ranks are done, 2 if one refused its input, 1 if one crashed.

    A signal to end goes on to the ranks, and once they have ended by it the status is 0, as it is of a single one.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        return _REFUSED if any(failure.exitcode == _REFUSED for failure in error.failures.values()) else 1
    except SignalException:
        pass
    return 0
