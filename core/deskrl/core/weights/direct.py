"""What learner and replica must do alike to move weights from GPU to GPU: join a communicator, pass handles.

Knows the messages between the two halves; the buckets themselves are planned in `buckets`. Imports no engine: vLLM's
module for NCCL is handed in by those who have one.
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
"""Buffers of either side: one is on its way while another is filled, or made use of, and a third evens them out."""
REPLICA_PATIENCE_S = 40.0
"""How long a replica waits for the next bucket, or for the commit."""
LEARNER_PATIENCE_S = 15.0
"""How long the learner waits for a replica to take a bucket: less, so that one that hangs costs others no update."""
JOIN_S = 60.0
"""How long either waits for the other in a new communicator."""
_LINE_BYTES = 16384


def host_name() -> str:
    """This host, as all processes of one boot of one machine name it, containers of it included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except FileNotFoundError:  # not every sandbox's kernel has one
        return socket.gethostname()


def join_nccl(pynccl: ModuleType, communicator_id: bytes, rank: int, world_size: int, device: Any) -> Any:
    """Join the communicator of an id that came by other ways; returns when all have joined, however long that takes.

    Args:
        pynccl: `vllm.distributed.device_communicators.pynccl`.
        communicator_id: NCCL's unique id.
        rank: here; the learner's is 0.
        world_size: of the communicator.
        device: this rank's GPU.
    """
    known = pynccl.ncclUniqueId.from_buffer_copy(communicator_id)

    class Group(pynccl.StatelessProcessGroup):  # type: ignore[name-defined, misc]
        """Stands for vLLM's own rendezvous, which would pickle the id through a store on the network."""

        def __init__(self) -> None:
            self.rank = rank
            self.world_size = world_size

        def broadcast_obj(self, obj: object, src: int) -> Any:
            return known

    communicator = pynccl.PyNcclCommunicator(Group(), device)
    if communicator.disabled:
        raise RuntimeError("vLLM finds no NCCL library that it can load")
    return communicator


def refuse_stranger(connection: socket.socket) -> None:
    """Raise PermissionError if the process at the other end of a Unix socket is another user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    user = int.from_bytes(credentials[4:8], sys.byteorder)
    if user != os.getuid():
        raise PermissionError(f"the process at the other end is user {user}'s")


def send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    """One JSON object as a line; bytes as hexadecimal digits."""
    connection.sendall(json.dumps(message, default=bytes.hex).encode() + b"\n")


def receive_line(connection: socket.socket) -> dict[str, Any]:
    """What `send_line` sent; raises ConnectionError if the other side is gone, ValueError if it sent something else."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) > _LINE_BYTES:
            raise ValueError("a line without end")
        if not (byte := connection.recv(1)):
            raise ConnectionError("the other side closed the connection")
        line += byte
    message: dict[str, Any] = json.loads(line)
    return message
