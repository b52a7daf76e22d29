"""How buckets reach a worker of vLLM's directly from the learner's GPU: over NCCL, or over CUDA IPC on the same GPU.

Knows memory, streams and the other side's vanishing; knows neither models nor what is in a bucket. Nothing in here
waits without a bound.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deskrl.core.bounds import in_background, outcome, wait_until
from deskrl.core.weights import direct
from deskrl.core.weights.buckets import Bucket

_WARM_UP_BYTES = 1024**2


class Link(Protocol):
    """Brings the buckets of one update, one after another."""

    def receive(self, index: int) -> Tensor:
        """Bucket `index`, whole, from the start of the buffer; raises GaveUp or OSError if it does not come."""

    def release(self, index: int) -> None:
        """Its buffer may be written to again once the current stream has got this far."""

    def close(self) -> None:
        """No more buckets of this update are wanted."""


class NcclCommunicator:
    """A communicator with the learner, joined in the background: the engine goes on sampling meanwhile."""

    def __init__(self, communicator_id: bytes, rank: int, world_size: int, device: torch.device) -> None:
        self._device = device
        self._joined = in_background(lambda: self._join(communicator_id, rank, world_size))

    def _join(self, communicator_id: bytes, rank: int, world_size: int) -> tuple[Any, torch.cuda.Stream]:
        from vllm.distributed.device_communicators import pynccl

        torch.cuda.set_device(self._device)
        communicator = direct.join_nccl(pynccl, communicator_id, rank, world_size, self._device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Broadcasts connect at the first one, and would block there if the learner vanished.
        communicator.broadcast(torch.empty(_WARM_UP_BYTES, dtype=torch.uint8, device=self._device), 0, stream)
        stream.synchronize()
        return communicator, stream

    def wait(self) -> tuple[Any, torch.cuda.Stream]:
        """The communicator and its stream, once joined; raises GaveUp if the learner does not come."""
        return outcome(self._joined, direct.JOIN_S, "joining the learner's communicator")

    def abort(self) -> None:
        """End it, whatever is under way; vLLM bounds this, too."""
        if self._joined.done() and self._joined.exception() is None:
            self._joined.result()[0].destroy()


class NcclLink:
    """Buckets of one update as they are broadcast, the next ones while the last is made use of."""

    def __init__(self, communicator: NcclCommunicator, buckets: Sequence[Bucket], slots: Sequence[Tensor]) -> None:
        self._nccl, self._stream = communicator.wait()
        self._buckets = buckets
        self._slots = slots
        self._arrived: list[torch.cuda.Event] = []
        self._free: dict[int, torch.cuda.Event] = {}

    def receive(self, index: int) -> Tensor:
        """See `Link`."""
        while len(self._arrived) < min(index + len(self._slots), len(self._buckets)):
            self._begin(len(self._arrived))
        arrived = self._arrived[index]
        wait_until(arrived.query, direct.REPLICA_PATIENCE_S, f"bucket {index} of {len(self._buckets)}")
        torch.cuda.current_stream().wait_event(arrived)
        return self._slots[index % len(self._slots)]

    def _begin(self, index: int) -> None:
        if (free := self._free.get(index - len(self._slots))) is not None:
            self._stream.wait_event(free)
        buffer = self._slots[index % len(self._slots)][: self._buckets[index].num_bytes]
        self._nccl.broadcast(buffer, src=0, stream=self._stream)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(self._stream)
        self._arrived.append(arrived)

    def release(self, index: int) -> None:
        """See `Link`."""
        self._free[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._free[index].record()

    def close(self) -> None:
        """See `Link`; the communicator stays."""


class IpcLink:
    """Buckets of one update in the learner's own buffers, mapped into this process for as long as the link lives."""

    def __init__(self, socket_path: str, num_buckets: int, device: torch.device) -> None:
        """Meet the learner at its socket; raises OSError or ValueError if it is not there, or not this user's."""
        self._num_buckets = num_buckets
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(direct.REPLICA_PATIENCE_S)
        self._connection.connect(socket_path)
        direct.refuse_stranger(self._connection)
        handles = direct.receive_line(self._connection)["slots"]
        self._slots = [_map(handle, device) for handle in handles]

    def receive(self, index: int) -> Tensor:
        """See `Link`."""
        if not self._connection.recv(1):
            raise ConnectionError(f"the learner left before bucket {index} of {self._num_buckets}")
        return self._slots[index % len(self._slots)]

    def release(self, index: int) -> None:
        """See `Link`."""
        used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        used.record()
        wait_until(used.query, direct.REPLICA_PATIENCE_S, f"the use of bucket {index}")
        self._connection.sendall(b"\1")

    def close(self) -> None:
        """See `Link`; the buffers are unmapped as the last view of them goes."""
        self._slots.clear()
        self._connection.close()


def _map(handle: dict[str, Any], device: torch.device) -> Tensor:
    """Memory of another process on this GPU, from what its storage told of itself."""
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index,
        bytes.fromhex(handle["handle"]),
        handle["size_bytes"],
        handle["offset_bytes"],
        bytes.fromhex(handle["ref_counter"]),
        handle["ref_counter_offset"],
        bytes.fromhex(handle["event"]),
        handle["event_sync_required"],
    )
    whole = torch.Size((storage.nbytes(),))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, whole, (1,))
