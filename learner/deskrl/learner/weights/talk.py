"""The stream of one update of weights, from the learner's end: events out, answers in, either until the other is gone.

Knows gRPC and the events' names; knows nothing of what they mean.
"""

from __future__ import annotations

import queue
import time
from typing import Any

import grpc

from deskrl.proto.v1 import weights_pb2, weights_pb2_grpc

_QUEUED = 8
"""Chunks ahead of the network."""
_POLL_S = 0.2


class Talk:
    """The stream of one update, from the learner's end."""

    def __init__(self, stub: weights_pb2_grpc.WeightServiceStub, timeout_s: float) -> None:
        self._started_s = time.perf_counter()
        self._requests: queue.Queue[weights_pb2.UpdateWeightsRequest | None] = queue.Queue(_QUEUED)
        self._call: Any = stub.UpdateWeights(iter(self._requests.get, None), timeout=timeout_s)

    def send(self, **event: Any) -> None:
        """Send one event; if the stream has ended, what is expected next says why."""
        self._put(weights_pb2.UpdateWeightsRequest(**event))

    def expect(self, event: str) -> weights_pb2.UpdateWeightsResponse:
        """The replica's next answer; raises grpc.RpcError if it is not this one."""
        for response in self._call:
            if response.WhichOneof("event") == event:
                answer: weights_pb2.UpdateWeightsResponse = response
                return answer
            break
        raise EndedEarly

    def is_active(self) -> bool:
        """Whether the replica still listens."""
        return bool(self._call.is_active())

    def elapsed_ms(self) -> float:
        """Since the update began."""
        return (time.perf_counter() - self._started_s) * 1e3

    def finish(self) -> None:
        """Nothing more is sent; return when the replica is done with the update, and free for another."""
        self._put(None)
        for _ in self._call:
            break

    def end(self) -> None:
        """Break off whatever is not finished."""
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
    """The replica closed the stream without an answer."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        return "the stream ended before the update was committed"
