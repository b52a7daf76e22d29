"""Direct GPU-to-GPU transfer of weights: timeouts, NCCL communicators and messages over Unix sockets.

Does not import vLLM; callers pass its NCCL module as an argument.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

NUM_SLOTS = 3
"""Buffers on each side: one in transfer, one being filled or read, and one to absorb variations."""
REPLICA_TIMEOUT_S = 40.0
"""Timeout of a replica for the next bucket and for the commit."""
LEARNER_TIMEOUT_S = 15.0
"""Timeout of the learner for the receipt of a bucket; shorter, so that a hung replica does not fail the others."""
JOIN_TIMEOUT_S = 60.0
"""Timeout of both sides for joining a new communicator."""
_LINE_BYTES = 16384


def host_id() -> str:
    """Return an identifier of this host, the same for all its processes (also in containers) until it reboots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except FileNotFoundError:  # some sandboxed kernels lack it
        return socket.gethostname()


def join_nccl(pynccl: ModuleType, communicator_id: bytes, rank: int, world_size: int, device: Any) -> Any:
    """Join an NCCL communicator; blocks until all ranks have joined.

    Args:
        pynccl: module `vllm.distributed.device_communicators.pynccl`.
        communicator_id: unique id of the communicator, as created by NCCL.
        rank: rank of this process; that of the learner is 0.
        world_size: number of ranks.
        device: GPU of this rank.

    Raises:
        RuntimeError: vLLM cannot load the NCCL library.
    """
    known = pynccl.ncclUniqueId.from_buffer_copy(communicator_id)

    class Group(pynccl.StatelessProcessGroup):  # type: ignore[name-defined, misc]
        """Replaces the rendezvous of vLLM, which would send the pickled id through a TCP store."""

        def __init__(self) -> None:
            self.rank = rank
            self.world_size = world_size

        def broadcast_obj(self, obj: object, src: int) -> Any:
            return known

    communicator = pynccl.PyNcclCommunicator(Group(), device)
    if communicator.disabled:
        raise RuntimeError("vLLM cannot load the NCCL library")
    return communicator


def check_same_user(connection: socket.socket) -> None:
    """Raise PermissionError if the peer of a Unix socket runs as another user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    user = int.from_bytes(credentials[4:8], sys.byteorder)
    if user != os.getuid():
        raise PermissionError(f"the peer process runs as user {user}")


def send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a JSON object as one line; bytes are encoded in hex."""
    connection.sendall(json.dumps(message, default=bytes.hex).encode() + b"\n")


def receive_line(connection: socket.socket) -> dict[str, Any]:
    """Receive an object that was sent with `send_line`.

    Raises:
        ConnectionError: the peer closed the connection.
        ValueError: the peer sent something else.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) > _LINE_BYTES:
            raise ValueError(f"a line exceeds {_LINE_BYTES} bytes")
        if not (byte := connection.recv(1)):
            raise ConnectionError("the peer closed the connection")
        line += byte
    message: dict[str, Any] = json.loads(line)
    return message
