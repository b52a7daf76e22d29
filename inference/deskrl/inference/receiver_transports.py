"""Transports by which a vLLM worker receives buckets directly from the learner's GPU: NCCL, or CUDA IPC on one GPU.

Every wait has a timeout.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deskrl.core.timeouts import run_in_background, wait_for_result, wait_until
from deskrl.core.weights import gpu_transfer
from deskrl.core.weights.buckets import Bucket

_WARM_UP_BYTES = 1024**2


class ReceiverTransport(Protocol):
    """Receives the buckets of one update in order."""

    def receive(self, index: int) -> Tensor:
        """Wait for bucket `index` and return a buffer (uint8) that begins with it; raises WaitFailed or OSError."""

    def release(self, index: int) -> None:
        """Allow the buffer of a bucket to be overwritten once the current stream has reached this point."""

    def close(self) -> None:
        """Stop receiving buckets of this update."""


class NcclCommunicator:
    """NCCL communicator with the learner, joined in the background so that the engine continues to sample."""

    def __init__(self, communicator_id: bytes, rank: int, world_size: int, device: torch.device) -> None:
        self._device = device
        self._joined = run_in_background(lambda: self._join(communicator_id, rank, world_size))

    def _join(self, communicator_id: bytes, rank: int, world_size: int) -> tuple[Any, torch.cuda.Stream]:
        from vllm.distributed.device_communicators import pynccl

        torch.cuda.set_device(self._device)
        communicator = gpu_transfer.join_nccl(pynccl, communicator_id, rank, world_size, self._device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # NCCL connects at the first broadcast, which would block during an update if the learner had ended.
        communicator.broadcast(torch.empty(_WARM_UP_BYTES, dtype=torch.uint8, device=self._device), 0, stream)
        stream.synchronize()
        return communicator, stream

    def wait(self) -> tuple[Any, torch.cuda.Stream]:
        """Return the communicator and its stream; raises WaitFailed if the learner does not join in time."""
        return wait_for_result(self._joined, gpu_transfer.JOIN_TIMEOUT_S, "joining the learner's communicator")

    def abort(self) -> None:
        """Destroy the communicator even if a transfer is in progress; vLLM limits the time that this takes."""
        if self._joined.done() and self._joined.exception() is None:
            self._joined.result()[0].destroy()


class NcclReceiver:
    """Receives broadcast buckets; the next ones are received while the last one is loaded."""

    def __init__(self, communicator: NcclCommunicator, buckets: Sequence[Bucket], slots: Sequence[Tensor]) -> None:
        self._nccl, self._stream = communicator.wait()
        self._buckets = buckets
        self._slots = slots
        self._arrived: list[torch.cuda.Event] = []
        self._free: dict[int, torch.cuda.Event] = {}

    def receive(self, index: int) -> Tensor:
        """Implement `ReceiverTransport`."""
        while len(self._arrived) < min(index + len(self._slots), len(self._buckets)):
            self._begin(len(self._arrived))
        arrived = self._arrived[index]
        wait_until(arrived.query, gpu_transfer.REPLICA_TIMEOUT_S, f"bucket {index} of {len(self._buckets)}")
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
        """Implement `ReceiverTransport`."""
        self._free[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._free[index].record()

    def close(self) -> None:
        """Implement `ReceiverTransport`; the communicator remains open for later updates."""


class IpcReceiver:
    """Reads buckets from the learner's own buffers, which are mapped into this process until `close`."""

    def __init__(self, socket_path: str, num_buckets: int, device: torch.device) -> None:
        """Connect to the learner; raises OSError or ValueError if that fails or it runs as another user."""
        self._num_buckets = num_buckets
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(gpu_transfer.REPLICA_TIMEOUT_S)
        self._connection.connect(socket_path)
        gpu_transfer.check_same_user(self._connection)
        handles = gpu_transfer.receive_line(self._connection)["slots"]
        self._slots = [_map_buffer(handle, device) for handle in handles]

    def receive(self, index: int) -> Tensor:
        """Implement `ReceiverTransport`."""
        if not self._connection.recv(1):
            raise ConnectionError(f"the learner disconnected before bucket {index} of {self._num_buckets}")
        return self._slots[index % len(self._slots)]

    def release(self, index: int) -> None:
        """Implement `ReceiverTransport`."""
        used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        used.record()
        wait_until(used.query, gpu_transfer.REPLICA_TIMEOUT_S, f"loading of bucket {index}")
        self._connection.sendall(b"\1")

    def close(self) -> None:
        """Implement `ReceiverTransport`; the buffers are unmapped once no tensor refers to them."""
        self._slots.clear()
        self._connection.close()


def _map_buffer(handle: dict[str, Any], device: torch.device) -> Tensor:
    """Map a buffer of another process on this GPU, as described by its CUDA IPC handle."""
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
