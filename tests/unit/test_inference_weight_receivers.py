"""Weight receivers: a direct update ends with the old weights, the new ones, or a replica marked as inconsistent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from deskrl.core.weights import gpu_transfer
from deskrl.inference.inference_service import RequestRejected
from deskrl.inference.weight_receivers import DirectReceiver, next_commit
from deskrl.inference.weight_staging import TransferResult, UpdateRejected
from deskrl.proto.v1 import weights_pb2

BEGIN = weights_pb2.UpdateBegin(
    tensors=[weights_pb2.TensorSpec(name="model.a"), weights_pb2.TensorSpec(name="visual.b")],
    nccl=weights_pb2.NcclTransfer(communicator_id=bytes(128)),
    bucket_bytes=1024,
)
TRANSFER = weights_pb2.UpdateWeightsRequest(transfer=weights_pb2.UpdateTransfer())


class PausedEngine:
    """Engine on a GPU that records its calls and returns a given result."""

    def __init__(self, result: TransferResult) -> None:
        self.calls: list[str] = []
        self._result = result

    async def pause(self) -> int:
        self.calls.append("pause")
        return 2

    async def receive(self, source: dict[str, Any], tensors: Any) -> TransferResult:
        self.calls.append(f"receive {len(tensors)} by {source}")
        return self._result

    async def resume(self) -> None:
        self.calls.append("resume")


async def events(*requests: weights_pb2.UpdateWeightsRequest) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
    for request in requests:
        yield request


def received_from(result: TransferResult) -> tuple[DirectReceiver, PausedEngine]:
    engine = PausedEngine(result)
    receiver = DirectReceiver(engine, BEGIN)  # type: ignore[arg-type]
    asyncio.run(receiver.receive(events(TRANSFER)))
    return receiver, engine


def test_complete_weights_are_accepted_if_their_checksums_equal_those_that_were_sent() -> None:
    receiver, engine = received_from(TransferResult([7, -8], "", is_model_modified=True))
    assert engine.calls == ["pause", "receive 2 by {'bucket_bytes': 1024, 'nccl': True}"]
    assert receiver.is_inconsistent, "not verified yet"
    checksums = asyncio.run(receiver.load(weights_pb2.UpdateCommit(checksums=[7, -8])))
    assert not receiver.is_inconsistent
    assert checksums.keys() == {"model.a", "visual.b"}
    assert receiver.num_kept == 2
    assert set(receiver.timer.phases_ms) == {"pause", "load", "verify"}


def test_differing_checksums_leave_the_replica_inconsistent() -> None:
    receiver, _ = received_from(TransferResult([7, -8], "", is_model_modified=True))
    with pytest.raises(UpdateRejected, match=r"checksums of 1 tensors differ: visual\.b"):
        asyncio.run(receiver.load(weights_pb2.UpdateCommit(checksums=[7, 8])))
    assert receiver.is_inconsistent


def test_a_commit_without_checksums_is_rejected() -> None:
    receiver, _ = received_from(TransferResult([7, -8], "", is_model_modified=True))
    with pytest.raises(UpdateRejected, match="checksums of 2 tensors differ"):
        asyncio.run(receiver.load(weights_pb2.UpdateCommit()))


@pytest.mark.parametrize(("is_model_modified", "later_calls"), [(False, ["resume"]), (True, [])])
def test_missing_buckets_leave_the_old_weights_in_use_if_none_was_loaded(
    is_model_modified: bool, later_calls: list[str]
) -> None:
    engine = PausedEngine(TransferResult((), "WaitFailed: bucket 0 of 9: timed out after 40 s", is_model_modified))
    receiver = DirectReceiver(engine, BEGIN)  # type: ignore[arg-type]
    with pytest.raises(RequestRejected, match="bucket 0 of 9") as rejection:
        asyncio.run(receiver.receive(events(TRANSFER)))
    assert rejection.value.code == grpc.StatusCode.ABORTED
    assert engine.calls[2:] == later_calls
    assert receiver.is_inconsistent == is_model_modified


def test_the_wait_for_a_commit_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_transfer, "REPLICA_TIMEOUT_S", 0.01)
    receiver, _ = received_from(TransferResult([7, -8], "", is_model_modified=True))

    async def silence() -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
        await asyncio.Event().wait()
        yield TRANSFER

    with pytest.raises(RequestRejected, match="no commit within 0 s"):
        asyncio.run(next_commit(silence(), receiver))
    assert receiver.is_inconsistent


def test_a_missing_socket_is_rejected_before_generation_is_paused() -> None:
    begin = weights_pb2.UpdateBegin(ipc=weights_pb2.IpcTransfer(socket_path="/nowhere/s"))
    with pytest.raises(RequestRejected, match="/nowhere/s: not found"):
        DirectReceiver(PausedEngine(TransferResult((), "", is_model_modified=False)), begin)  # type: ignore[arg-type]
