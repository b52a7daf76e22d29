"""Starts the learner's ranks of this node with torchrun and maps their exit statuses to one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from deskrl.core.addresses import format_address
from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.process_lifecycle import STOPPED_STATUS
from deskrl.learner.nodes.node_facts import read_facts
from deskrl.learner.nodes.node_rank import check_rendezvous
from deskrl.learner.nodes.node_rendezvous import NodeRendezvous, RendezvousFailed
from deskrl.learner.nodes.node_store import Ending

RANK_PROGRAM: tuple[str, ...] = ("-m", "deskrl.cli.main")
"""Arguments of Python that run a rank."""
_FAILED = 1
_INVALID_INPUT = 2
"""Exit status of a rank that rejected its input (UserError)."""

_log = logging.getLogger(__name__)


def main(config: RunConfig, node_rank: int, command: Sequence[str]) -> int:
    """Run the ranks of this node and return the exit status: 0 if all succeeded, 2 if one rejected its input, else 1.

    SIGTERM and SIGINT are forwarded to the ranks; once they have stopped, the status is `STOPPED_STATUS`, as for a
    single rank.

    Args:
        config: run configuration.
        node_rank: rank of this node, from 0.
        command: arguments of `deskrl` with which each rank is started.

    Raises:
        UserError: the nodes of the learner have no address to meet at, or cannot train together.
    """
    # By default, torchrun kills ranks 30 s after SIGTERM, possibly while they write a checkpoint. The supervisor has
    # its own timeout, after which it kills the ranks too.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    learner = config.learner
    # Without a log directory, torchrun creates a temporary one and does not remove it.
    arguments = [f"--nproc-per-node={learner.num_processes}", f"--log-dir={os.devnull}"]
    ranks = [*RANK_PROGRAM, *command]
    if learner.num_nodes == 1:
        where = [f"--master-port={learner.master_port}"] if learner.master_port else ["--standalone"]
        return _run([*arguments, *where, *ranks])[0]
    check_rendezvous(learner)
    rendezvous = NodeRendezvous(learner, node_rank, read_facts(config))
    ending = Ending.FAILED
    try:
        status, ending = _run([*arguments, *_rendezvous_arguments(learner, rendezvous), *ranks])
    except RendezvousFailed as error:
        _log.error("%s: start this node again", error)
        return _FAILED
    finally:
        rendezvous.leave(ending)
    return status


def _rendezvous_arguments(learner: LearnerConfig, rendezvous: NodeRendezvous) -> list[str]:
    """Return torchrun's arguments for several nodes, after registering their rendezvous."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    assert learner.master_addr is not None
    name = rendezvous.get_backend()
    rendezvous_handler_registry.register(name, lambda parameters: rendezvous)
    endpoint = format_address(learner.master_addr, learner.master_port)
    return [f"--nnodes={learner.num_nodes}", f"--rdzv-backend={name}", f"--rdzv-endpoint={endpoint}"]


def _run(arguments: Sequence[str]) -> tuple[int, Ending]:
    """Run torchrun; return the exit status, and how the ranks of this node ended."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        is_invalid = any(failure.exitcode == _INVALID_INPUT for failure in error.failures.values())
        return (_INVALID_INPUT if is_invalid else _FAILED), Ending.FAILED
    except SignalException:
        return STOPPED_STATUS, Ending.STOPPED
    return 0, Ending.FINISHED
