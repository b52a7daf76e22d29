"""Transport choice: selects how weights are transferred from the learner to a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.core.errors import UserError


@dataclass(frozen=True)
class Endpoint:
    """Hardware and software of the learner or of a replica that determine the possible transports."""

    host: str
    """Identifier of the machine."""
    gpu_uuids: Sequence[str]
    has_nccl: bool = True


def choose_transfer(requested: str, learner: Endpoint, replica: Endpoint) -> str:
    """Return the transfer to use: `ipc`, `nccl` or `stream`, in this order of preference.

    Args:
        requested: value of `inference.weight_transfer`.
        learner: endpoint of rank 0, the sender.
        replica: endpoint of the receiver; a replica with GPUs always has NCCL.

    Raises:
        UserError: the requested transfer is not possible between the two.
    """
    reasons = {
        "ipc": _reason_against_ipc(learner, replica),
        "nccl": _reason_against_nccl(learner, replica),
        "stream": "",
    }
    if requested == "auto":
        return next(transfer for transfer, reason in reasons.items() if not reason)
    if reasons[requested]:
        raise UserError(
            f'inference.weight_transfer = "{requested}" is not possible: {reasons[requested]}',
            'set inference.weight_transfer = "auto", or correct learner.devices and inference.devices',
        )
    return requested


def _reason_against_ipc(learner: Endpoint, replica: Endpoint) -> str:
    if reason := _reason_without_gpus(learner, replica):
        return reason
    if learner.host != replica.host or list(learner.gpu_uuids) != list(replica.gpu_uuids):
        return "learner and replica do not share one GPU"
    return ""


def _reason_against_nccl(learner: Endpoint, replica: Endpoint) -> str:
    if reason := _reason_without_gpus(learner, replica):
        return reason
    if learner.host == replica.host and set(learner.gpu_uuids) & set(replica.gpu_uuids):
        return "learner and replica share a GPU, which NCCL does not support"
    if not learner.has_nccl:
        return "vllm, which provides the NCCL binding, is not installed on the learner's machine"
    return ""


def _reason_without_gpus(learner: Endpoint, replica: Endpoint) -> str:
    if not learner.gpu_uuids:
        return "the learner has no GPU"
    if not replica.gpu_uuids:
        return "the replica has no GPU"
    return ""
