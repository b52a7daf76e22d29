"""An update that comes directly leaves the old weights, the new ones, or a replica that knows that it has neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from deskrl.core.weights import direct
from deskrl.inference.acting import RequestRefused
from deskrl.inference.arrivals import DirectArrival, next_commit
from deskrl.inference.weights import Received, UpdateRefused
from deskrl.proto.v1 import weights_pb2

BEGIN = weights_pb2.UpdateBegin(
    tensors=[weights_pb2.TensorSpec(name="model.a"), weights_pb2.TensorSpec(name="visual.b")],
    nccl=weights_pb2.NcclTransfer(communicator_id=bytes(128)),
    bucket_bytes=1024,
)
TRANSFER = weights_pb2.UpdateWeightsRequest(transfer=weights_pb2.UpdateTransfer())


class PausedEngine:
    """Stands for an engine on a GPU: notes what it is asked, and has received what it is told."""

    def __init__(self, received: Received) -> None:
        self.asked: list[str] = []
        self._received = received

    async def pause(self) -> int:
        self.asked.append("pause")
        return 2

    async def receive(self, source: dict[str, Any], tensors: Any) -> Received:
        self.asked.append(f"receive {len(tensors)} by {source}")
        return self._received

    async def resume(self) -> None:
        self.asked.append("resume")


async def events(*requests: weights_pb2.UpdateWeightsRequest) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
    for request in requests:
        yield request


def arrive(received: Received) -> tuple[DirectArrival, PausedEngine]:
    engine = PausedEngine(received)
    arrival = DirectArrival(engine, BEGIN)  # type: ignore[arg-type]
    asyncio.run(arrival.receive(events(TRANSFER)))
    return arrival, engine


def test_what_came_whole_is_taken_once_its_checksums_are_those_that_were_sent() -> None:
    arrival, engine = arrive(Received([7, -8], "", touched=True))
    assert engine.asked == ["pause", "receive 2 by {'bucket_bytes': 1024, 'nccl': True}"]
    assert arrival.is_half_way, "until it is proven"
    checksums = asyncio.run(arrival.load(weights_pb2.UpdateCommit(checksums=[7, -8])))
    assert not arrival.is_half_way
    assert checksums.keys() == {"model.a", "visual.b"}
    assert arrival.num_kept == 2
    assert set(arrival.clock.phases_ms) == {"pause", "load", "verify"}


def test_other_checksums_than_were_sent_end_half_way() -> None:
    arrival, _ = arrive(Received([7, -8], "", touched=True))
    with pytest.raises(UpdateRefused, match=r"checksums differ of 1 tensors: visual\.b"):
        asyncio.run(arrival.load(weights_pb2.UpdateCommit(checksums=[7, 8])))
    assert arrival.is_half_way


def test_a_commit_that_proves_nothing_is_none() -> None:
    arrival, _ = arrive(Received([7, -8], "", touched=True))
    with pytest.raises(UpdateRefused, match="checksums differ of 2 tensors"):
        asyncio.run(arrival.load(weights_pb2.UpdateCommit()))


@pytest.mark.parametrize(("touched", "after"), [(False, ["resume"]), (True, [])])
def test_buckets_that_do_not_come_leave_the_old_weights_if_none_came(touched: bool, after: list[str]) -> None:
    engine = PausedEngine(Received((), "GaveUp: bucket 0 of 9: nothing within 40 s", touched))
    arrival = DirectArrival(engine, BEGIN)  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match="bucket 0 of 9") as refusal:
        asyncio.run(arrival.receive(events(TRANSFER)))
    assert refusal.value.code == grpc.StatusCode.ABORTED
    assert engine.asked[2:] == after
    assert arrival.is_half_way == touched


def test_a_commit_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "REPLICA_PATIENCE_S", 0.01)
    arrival, _ = arrive(Received([7, -8], "", touched=True))

    async def silence() -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
        await asyncio.Event().wait()
        yield TRANSFER

    with pytest.raises(RequestRefused, match="no commit within 0 s"):
        asyncio.run(next_commit(silence(), arrival))
    assert arrival.is_half_way


def test_a_socket_that_is_not_there_is_refused_before_generation_stops() -> None:
    begin = weights_pb2.UpdateBegin(ipc=weights_pb2.IpcTransfer(socket_path="/nowhere/s"))
    with pytest.raises(RequestRefused, match="there is no /nowhere/s here"):
        DirectArrival(PausedEngine(Received((), "", touched=False)), begin)  # type: ignore[arg-type]
