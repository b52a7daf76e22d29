"""How full buffers on rank 0's GPU get to one replica: over NCCL, or by letting it look at them over CUDA IPC.

Knows buffers and one other side each; knows no tensors' names. Nothing in here waits without a bound.
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

from deskrl.core.bounds import GaveUp, in_background, outcome, wait_until
from deskrl.core.weights import direct

_WARM_UP_BYTES = 1024**2


class Channel(Protocol):
    """One replica's end of an update."""

    def start(self, slots: Sequence[Tensor]) -> None:
        """The replica has been told that buckets follow in these buffers."""

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """Begin to send what a buffer holds once it is filled."""

    def wait(self, slot: int) -> None:
        """Wait until the replica has what was last sent from a buffer; raises GaveUp or OSError if it does not."""

    def finish(self) -> None:
        """All was sent and taken."""

    def abort(self) -> None:
        """The replica is given up: let go of it, whatever is under way."""


class NcclChannel:
    """A communicator with one replica's workers, which outlives updates."""

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self._device = device
        self._world_size = 1 + num_workers
        self._pynccl = importlib.import_module("vllm.distributed.device_communicators.pynccl")
        self.communicator_id = bytes(self._pynccl.NCCLLibrary().ncclGetUniqueId())
        self.is_possible: Callable[[], bool] = lambda: True
        """Whether the replica can still take anything; each update says how to know."""
        self._nccl: Any = None
        self._slots: Sequence[Tensor] = ()
        self._sent: dict[int, tuple[torch.cuda.Event, float]] = {}

    def join(self) -> None:
        """Meet the replica's workers, which have been told the id; raises GaveUp if they do not come."""
        self._nccl, self._stream = outcome(in_background(self._join), direct.JOIN_S, "joining the replica")

    def _join(self) -> tuple[Any, torch.cuda.Stream]:
        torch.cuda.set_device(self._device)
        communicator = direct.join_nccl(self._pynccl, self.communicator_id, 0, self._world_size, self._device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The replica's half of this is in its own join: broadcasts connect at the first one.
        communicator.broadcast(torch.zeros(_WARM_UP_BYTES, dtype=torch.uint8, device=self._device), 0, stream)
        stream.synchronize()
        return communicator, stream

    def start(self, slots: Sequence[Tensor]) -> None:
        """See `Channel`."""
        self._slots = slots
        self._sent.clear()

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """See `Channel`."""
        self._stream.wait_event(filled)
        self._nccl.broadcast(self._slots[slot][:num_bytes], src=0, stream=self._stream)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(self._stream)
        self._sent[slot] = (sent, time.monotonic())

    def wait(self, slot: int) -> None:
        """See `Channel`."""
        sent, since_s = self._sent[slot]
        timeout_s = since_s + direct.LEARNER_PATIENCE_S - time.monotonic()
        wait_until(sent.query, timeout_s, "the replica takes no bucket", possible=self.is_possible)

    def finish(self) -> None:
        """See `Channel`."""

    def abort(self) -> None:
        """See `Channel`."""
        if self._nccl is not None:
            self._nccl.destroy()


class IpcChannel:
    """A replica on the same GPU, which is shown the buffers over a Unix socket; of one update."""

    def __init__(self, handles: Sequence[dict[str, Any]]) -> None:
        """Listen; `handles` are those of the buffers."""
        self._handles = handles
        self._folder = Path(tempfile.mkdtemp(prefix="ipc-"))
        self.path = self._folder / "s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._listener.settimeout(direct.LEARNER_PATIENCE_S)
        self._connection: socket.socket | None = None

    def start(self, slots: Sequence[Tensor]) -> None:
        """See `Channel`; gives the handles to whoever of this user comes first."""
        self._connection, _ = self._listener.accept()
        self._connection.settimeout(direct.LEARNER_PATIENCE_S)
        direct.refuse_stranger(self._connection)
        direct.send_line(self._connection, {"slots": list(self._handles)})

    def send(self, slot: int, num_bytes: int, filled: torch.cuda.Event) -> None:
        """See `Channel`."""
        assert self._connection is not None
        filled.synchronize()
        self._connection.sendall(b"\1")

    def wait(self, slot: int) -> None:
        """See `Channel`."""
        assert self._connection is not None
        if not self._connection.recv(1):
            raise GaveUp("the replica left in the middle of an update")

    def finish(self) -> None:
        """See `Channel`."""
        self.abort()

    def abort(self) -> None:
        """See `Channel`."""
        for end in (self._connection, self._listener):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def ipc_handle(buffer: Tensor) -> dict[str, Any]:
    """What another process of this host needs to map a buffer that is a storage of its own. The buffer must stay."""
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
