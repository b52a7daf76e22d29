"""Sender transports: move filled buffers from rank 0's GPU to one replica, by NCCL broadcast or CUDA IPC.

Every wait has a timeout.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deskrl.core.timeouts import WaitFailed, run_in_background, wait_for_result, wait_until
from deskrl.core.weights import gpu_transfer

_WARM_UP_BYTES = 1024**2


class Transport(Protocol):
    """The learner's side of a transfer of buckets to one replica."""

    def start(self, slots: Sequence[Tensor]) -> None:
        """Begin an update; the replica already expects buckets in these buffers."""

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """Begin to send the contents of a buffer once `filled` has occurred."""

    def wait(self, slot: int) -> None:
        """Wait until the replica has consumed a buffer.

        Raises:
            WaitFailed, OSError: the replica does not consume it within the timeout or has gone away.
        """

    def finish(self) -> None:
        """End an update whose buckets have all been consumed."""

    def abort(self) -> None:
        """Release the replica at once, whatever is in progress."""


class NcclTransport:
    """NCCL communicator with the workers of one replica; it persists across updates.

    Args:
        device: GPU of the learner's rank 0.
        num_workers: number of the replica's GPU workers.
    """

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self._device = device
        self._world_size = 1 + num_workers
        # Imported lazily: only learners that use NCCL need vLLM. torch.distributed cannot add a process group that
        # spans processes outside its world, so both sides use vLLM's binding.
        self._pynccl = importlib.import_module("vllm.distributed.device_communicators.pynccl")
        self.communicator_id = bytes(self._pynccl.NCCLLibrary().ncclGetUniqueId())
        self.is_possible: Callable[[], bool] = lambda: True
        """Whether the replica can still receive; set by each update."""
        self._nccl: Any = None
        self._slots: Sequence[Tensor] = ()
        self._sent: dict[int, tuple[torch.cuda.Event, float]] = {}

    def join(self) -> None:
        """Form the communicator with the replica's workers, which already have its id.

        Raises:
            WaitFailed: the workers do not join within the timeout.
        """
        joining = run_in_background(self._join)
        self._nccl, self._stream = wait_for_result(joining, gpu_transfer.JOIN_TIMEOUT_S, "joining the replica")

    def _join(self) -> tuple[Any, torch.cuda.Stream]:
        torch.cuda.set_device(self._device)
        communicator = gpu_transfer.join_nccl(self._pynccl, self.communicator_id, 0, self._world_size, self._device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # NCCL connects at the first broadcast; the replica takes part in this one when it joins.
        communicator.broadcast(torch.zeros(_WARM_UP_BYTES, dtype=torch.uint8, device=self._device), 0, stream)
        stream.synchronize()
        return communicator, stream

    def start(self, slots: Sequence[Tensor]) -> None:
        """See `Transport`."""
        self._slots = slots
        self._sent.clear()

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """See `Transport`."""
        self._stream.wait_event(filled)
        self._nccl.broadcast(self._slots[slot][:num_bytes], src=0, stream=self._stream)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(self._stream)
        self._sent[slot] = (sent, time.monotonic())

    def wait(self, slot: int) -> None:
        """See `Transport`."""
        sent, since_s = self._sent[slot]
        timeout_s = since_s + gpu_transfer.LEARNER_TIMEOUT_S - time.monotonic()
        wait_until(sent.query, timeout_s, "sending a bucket to the replica", is_possible=self.is_possible)

    def finish(self) -> None:
        """See `Transport`."""

    def abort(self) -> None:
        """See `Transport`."""
        if self._nccl is not None:
            self._nccl.destroy()


class IpcTransport:
    """Transport of one update to a replica on the same GPU: the replica maps the buffers by CUDA IPC.

    A Unix socket carries the handles and the synchronisation.

    Args:
        handles: CUDA IPC handles of the buffers.
    """

    def __init__(self, handles: Sequence[dict[str, Any]]) -> None:
        self._handles = handles
        self._folder = Path(tempfile.mkdtemp(prefix="ipc-"))
        self.path = self._folder / "s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._listener.settimeout(gpu_transfer.LEARNER_TIMEOUT_S)
        self._connection: socket.socket | None = None

    def start(self, slots: Sequence[Tensor]) -> None:
        """See `Transport`; sends the handles to the first client, which must belong to the same user."""
        self._connection, _ = self._listener.accept()
        self._connection.settimeout(gpu_transfer.LEARNER_TIMEOUT_S)
        gpu_transfer.check_same_user(self._connection)
        gpu_transfer.send_line(self._connection, {"slots": list(self._handles)})

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """See `Transport`."""
        assert self._connection is not None
        filled.synchronize()
        self._connection.sendall(b"\1")

    def wait(self, slot: int) -> None:
        """See `Transport`."""
        assert self._connection is not None
        if not self._connection.recv(1):
            raise WaitFailed("the replica closed the connection during an update")

    def finish(self) -> None:
        """See `Transport`."""
        self.abort()

    def abort(self) -> None:
        """See `Transport`."""
        for end in (self._connection, self._listener):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def ipc_handle(buffer: Tensor) -> dict[str, Any]:
    """Return the CUDA IPC handle of a buffer, with which another process of this host maps it.

    Args:
        buffer: tensor that is its own storage; it must stay allocated while it is mapped.
    """
    _, handle, size_bytes, offset_bytes, ref_counter, ref_counter_offset, event, event_sync_required = (
        buffer.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    )
    return {
        "handle": handle,
        "size_bytes": size_bytes,
        "offset_bytes": offset_bytes,
        "ref_counter": ref_counter,
        "ref_counter_offset": ref_counter_offset,
        "event": event,
        "event_sync_required": event_sync_required,
    }
