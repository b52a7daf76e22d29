"""DirectoryService: lists the inference replicas that have joined the job, kept in memory."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from deskrl.core.addresses import HostPort
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc
from deskrl.replay.servicer_helpers import aborts_on_status_error, check_protocol
from deskrl.replay.status_errors import InvalidRequestError

TTL_S = 10.0
"""Time after which a replica that does not announce itself again is removed."""
_MAX_REPLICAS = 1024


class _Announcement(NamedTuple):
    expires_s: float
    replica: directory_pb2.JoinedReplica


class DirectoryServicer(directory_pb2_grpc.DirectoryServiceServicer):
    """Implementation of directory.proto."""

    def __init__(self) -> None:
        self._announcements: dict[str, _Announcement] = {}

    @aborts_on_status_error
    async def Announce(self, request: directory_pb2.AnnounceRequest, context: Any) -> directory_pb2.AnnounceResponse:
        """Add, refresh or remove a replica."""
        check_protocol(request.peer)
        try:
            HostPort(request.address)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error
        self._announcements.pop(request.address, None)
        if not request.is_leaving:
            if len(self._current()) >= _MAX_REPLICAS:
                raise InvalidRequestError(f"too many replicas: {_MAX_REPLICAS} have joined already")
            replica = directory_pb2.JoinedReplica(address=request.address)
            if request.HasField("version"):
                replica.version.CopyFrom(request.version)
            self._announcements[request.address] = _Announcement(time.monotonic() + TTL_S, replica)
        return directory_pb2.AnnounceResponse(ttl_s=TTL_S)

    @aborts_on_status_error
    async def ListReplicas(
        self, request: directory_pb2.ListReplicasRequest, context: Any
    ) -> directory_pb2.ListReplicasResponse:
        """List the current replicas, sorted by address."""
        check_protocol(request.peer)
        replicas = [announcement.replica for _, announcement in sorted(self._current().items())]
        return directory_pb2.ListReplicasResponse(replicas=replicas)

    def _current(self) -> dict[str, _Announcement]:
        now_s = time.monotonic()
        self._announcements = {address: it for address, it in self._announcements.items() if it.expires_s > now_s}
        return self._announcements
