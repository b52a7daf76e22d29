"""Which way weights take from the learner to a replica. Pure; knows what both have, and neither torch nor gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.core.errors import UserError


@dataclass(frozen=True)
class Side:
    """What one side has."""

    host: str
    gpu_uuids: Sequence[str]
    has_nccl: bool = True


def choose_transfer(asked: str, learner: Side, replica: Side) -> str:
    """`ipc`, `nccl` or `stream`.

    Args:
        asked: `inference.weight_transfer`.
        learner: rank 0, which sends.
        replica: which receives; has NCCL wherever it has GPUs.

    Raises:
        UserError: what was asked for cannot be had between these two.
    """
    reasons = {
        "ipc": _reason_against_ipc(learner, replica),
        "nccl": _reason_against_nccl(learner, replica),
        "stream": "",
    }
    if asked == "auto":
        return next(way for way, reason in reasons.items() if not reason)
    if reasons[asked]:
        mend = 'set inference.weight_transfer = "auto", or mend learner.devices and inference.devices'
        raise UserError(f'inference.weight_transfer = "{asked}", and {reasons[asked]}', mend)
    return asked


def _reason_against_ipc(learner: Side, replica: Side) -> str:
    if reason := _reason_without_gpus(learner, replica):
        return reason
    if learner.host != replica.host or list(learner.gpu_uuids) != list(replica.gpu_uuids):
        return "learner and replica do not share one GPU"
    return ""


def _reason_against_nccl(learner: Side, replica: Side) -> str:
    if reason := _reason_without_gpus(learner, replica):
        return reason
    if learner.host == replica.host and set(learner.gpu_uuids) & set(replica.gpu_uuids):
        return "learner and replica share a GPU, over which NCCL does not communicate"
    if not learner.has_nccl:
        return "the learner's machine has no vllm, through which it would use NCCL"
    return ""


def _reason_without_gpus(learner: Side, replica: Side) -> str:
    if not learner.gpu_uuids:
        return "the learner has no GPU"
    if not replica.gpu_uuids:
        return "the replica has no GPU"
    return ""
