"""DirectoryService: which inference replicas have joined the job. Knows a clock and a list; stores nothing."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from deskrl.core.config import refuse_no_address
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc
from deskrl.replay.answers import admit, refusing
from deskrl.replay.refusals import Malformed

TTL_S = 10.0
"""A replica that is not heard of for this long is forgotten."""
_MAX_REPLICAS = 1024


class _Heard(NamedTuple):
    until_s: float
    replica: directory_pb2.JoinedReplica


class DirectoryServicer(directory_pb2_grpc.DirectoryServiceServicer):
    """See directory.proto."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    @refusing
    async def Announce(self, request: directory_pb2.AnnounceRequest, context: Any) -> directory_pb2.AnnounceResponse:
        """Take down a replica, or strike it off."""
        admit(request.peer)
        try:
            refuse_no_address(request.address)
        except ValueError as error:
            raise Malformed(str(error)) from error
        self._heard.pop(request.address, None)
        if not request.is_leaving:
            if len(self._current()) >= _MAX_REPLICAS:
                raise Malformed(f"{_MAX_REPLICAS} replicas have joined already")
            replica = directory_pb2.JoinedReplica(address=request.address)
            if request.HasField("version"):
                replica.version.CopyFrom(request.version)
            self._heard[request.address] = _Heard(time.monotonic() + TTL_S, replica)
        return directory_pb2.AnnounceResponse(ttl_s=TTL_S)

    @refusing
    async def ListReplicas(
        self, request: directory_pb2.ListReplicasRequest, context: Any
    ) -> directory_pb2.ListReplicasResponse:
        """Everyone who was heard of lately, in the order of addresses."""
        admit(request.peer)
        replicas = [heard.replica for _, heard in sorted(self._current().items())]
        return directory_pb2.ListReplicasResponse(replicas=replicas)

    def _current(self) -> dict[str, _Heard]:
        now_s = time.monotonic()
        self._heard = {address: heard for address, heard in self._heard.items() if heard.until_s > now_s}
        return self._heard
