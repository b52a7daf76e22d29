"""Update stream: the learner's side of the bidirectional gRPC stream of one weight update."""

from __future__ import annotations

import queue
import time
from typing import Any

import grpc

from deskrl.proto.v1 import weights_pb2, weights_pb2_grpc

_MAX_QUEUED_EVENTS = 8
"""Events queued ahead of the network."""
_POLL_S = 0.2


class UpdateStream:
    """Stream of one update to one replica.

    Args:
        stub: weight service of the replica.
        timeout_s: deadline of the whole update, in seconds.
    """

    def __init__(self, stub: weights_pb2_grpc.WeightServiceStub, timeout_s: float) -> None:
        self._started_s = time.perf_counter()
        self._requests: queue.Queue[weights_pb2.UpdateWeightsRequest | None] = queue.Queue(_MAX_QUEUED_EVENTS)
        self._call: Any = stub.UpdateWeights(iter(self._requests.get, None), timeout=timeout_s)

    def send(self, **event: Any) -> None:
        """Send one event; if the stream has ended, the event is dropped and the next `expect` raises the reason."""
        self._put(weights_pb2.UpdateWeightsRequest(**event))

    def expect(self, event: str) -> weights_pb2.UpdateWeightsResponse:
        """Return the next response; raise grpc.RpcError if it is not the named event."""
        for response in self._call:
            if response.WhichOneof("event") == event:
                answer: weights_pb2.UpdateWeightsResponse = response
                return answer
            break
        raise EndedEarly

    def is_active(self) -> bool:
        """Return whether the replica still has the stream open."""
        return bool(self._call.is_active())

    def elapsed_ms(self) -> float:
        """Return the time since the update began, in milliseconds."""
        return (time.perf_counter() - self._started_s) * 1e3

    def finish(self) -> None:
        """Close the sending side; return when the replica has finished the update and can accept another."""
        self._put(None)
        for _ in self._call:
            break

    def cancel(self) -> None:
        """Cancel the stream if it is not finished."""
        self._call.cancel()
        self._put(None)

    def _put(self, request: weights_pb2.UpdateWeightsRequest | None) -> None:
        while True:
            try:
                return self._requests.put(request, timeout=_POLL_S)
            except queue.Full:
                if not self.is_active():
                    return None


class EndedEarly(grpc.RpcError):
    """Raised when the replica closes the stream without the expected response."""

    def code(self) -> grpc.StatusCode:
        """Return the status code of the failed update."""
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        """Return the error message."""
        return "the stream ended before the update was committed"
