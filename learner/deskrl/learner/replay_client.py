"""The learner's side of the replay contract: plans, groups, commits, screenshots. Knows gRPC; decides nothing.

A replay service that restarts, or whose disk is full, is waited for; while waiting, a stop is noticed at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc

from deskrl.core import rpc
from deskrl.core.byte_cache import ByteCache
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.learner import stopping
from deskrl.proto.v1 import common_pb2, directory_pb2, directory_pb2_grpc, replay_pb2, replay_pb2_grpc

WAIT_S = 2.0
"""How long one TakeGroup waits on the server."""
RESTART_S = 60.0
"""How long a replay service may be away."""
KEPT_IMAGE_BYTES = 1024**3
"""Of screenshots, as they came: about what a batch of 256 episodes shows."""
NUM_ASKED_AHEAD = 4
"""Groups on their way at once: replay binds the next ones, on its disk, while one is decoded here."""
FULL_S = 3600.0
"""How long its disk may be full."""
_POLL_S = 0.2
_RETRY_S = 1.0
_FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
_REFUSALS = {grpc.StatusCode.FAILED_PRECONDITION, _FULL}
"""Another protocol version, a store that contradicts this learner, a disk that stays full: a person sees to it."""

_log = logging.getLogger("deskrl.learner")


@dataclass
class _Asked:
    """A unary call under way."""

    method: Any
    request: Any
    call: Any


class ReplayClient:
    """Calls of one learner rank.

    Args:
        address: of the replay service.
        name: of this rank, for the service's log.
        stop: ends any wait with `Stopped`.
    """

    def __init__(self, address: str, name: str, stop: StopEvent) -> None:
        self._address = address
        self._channel = rpc.connect_sync(address)
        self._stub = replay_pb2_grpc.ReplayServiceStub(self._channel)
        self._directory = directory_pb2_grpc.DirectoryServiceStub(self._channel)
        self._peer = rpc.peer("learner", name)
        self._stop = stop
        self._images: ByteCache[bytes] = ByteCache(KEPT_IMAGE_BYTES)
        """The newest screenshots: rows of one batch show the same ones, micro-batches apart."""

    def plan(self, groups: Sequence[replay_pb2.GroupPlan]) -> None:
        """Add work; groups that exist already stay as they are."""
        if groups:
            self._call(self._stub.PlanGroups, replay_pb2.PlanGroupsRequest(peer=self._peer, groups=groups))

    def set_policy_version(self, version: common_pb2.PolicyVersion, num_updates: int) -> None:
        """Tell which version acts from now on."""
        request = replay_pb2.SetPolicyVersionRequest(version=version, num_updates=num_updates)
        self._call(self._stub.SetPolicyVersion, request)

    def take_groups(
        self,
        queue: str,
        batch_id: str,
        ordinals: Iterable[int],
        dropped: Callable[[], Sequence[str]],
        while_waiting: Callable[[], None],
    ) -> Iterator[replay_pb2.Group]:
        """The groups at places of a batch, in order; waits for each as long as it takes.

        Args:
            queue: to take from.
            batch_id: of the batch.
            ordinals: places in the batch, all of which will be needed: a few are asked for ahead.
            dropped: groups of this batch that are known to be dropped by now, all of them.
            while_waiting: called whenever the next group has not come for `WAIT_S`.
        """

        def ask(ordinal: int) -> tuple[int, _Asked]:
            request = replay_pb2.TakeGroupRequest(
                peer=self._peer,
                queue=queue,
                batch_id=batch_id,
                ordinal=ordinal,
                wait_s=WAIT_S,
                dropped_group_ids=dropped(),
            )
            return ordinal, self._begin(self._stub.TakeGroup, request)

        places = iter(ordinals)
        asked = deque(ask(ordinal) for ordinal in islice(places, NUM_ASKED_AHEAD))
        try:
            while asked:
                ordinal, next_one = asked[0]
                response: replay_pb2.TakeGroupResponse = self._result(next_one)
                if not response.HasField("group"):
                    while_waiting()
                    asked[0] = ask(ordinal)
                    continue
                asked.popleft()
                yield response.group
                asked.extend(ask(following) for following in islice(places, 1))
        finally:
            for _, given_up in asked:
                given_up.call.cancel()

    def commit(
        self,
        queue: str,
        batch_id: str,
        verdicts: Sequence[replay_pb2.GroupVerdict],
        version: common_pb2.PolicyVersion,
    ) -> None:
        """End a batch whose learning is on disk."""
        request = replay_pb2.CommitBatchRequest(
            peer=self._peer, queue=queue, batch_id=batch_id, verdicts=verdicts, version=version
        )
        self._call(self._stub.CommitBatch, request)

    def fetch_images(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Bytes of screenshots by hash; each is asked for once, as long as there is room to keep it."""
        wanted = set(hashes)
        stopping.check(self._stop)
        images = {name: data for name in wanted if (data := self._images.get(name)) is not None}
        if missing := sorted(wanted.difference(images)):
            self._fetch(missing, images)
        for name, data in images.items():
            self._images.put(name, data, len(data))
        return images

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Counters of the service."""
        response: replay_pb2.GetReplayStatusResponse = self._call(
            self._stub.GetReplayStatus, replay_pb2.GetReplayStatusRequest()
        )
        return response

    def num_closed_train_groups(self) -> int:
        """Planned groups of the training queue that faults have closed: they will never be taken."""
        return int(self.status().dropped.get("faults", 0))

    def joined_replicas(self) -> list[str]:
        """Where the inference replicas are that have joined the job; raises grpc.RpcError where replay is away."""
        request = directory_pb2.ListReplicasRequest(peer=self._peer)
        listed: directory_pb2.ListReplicasResponse = self._directory.ListReplicas(request, timeout=rpc.UNARY_TIMEOUT_S)
        return [replica.address for replica in listed.replicas]

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _call(self, method: Any, request: Any) -> Any:
        """A unary call that a restart of the service delays, and a stop ends."""
        return self._result(self._begin(method, request))

    def _begin(self, method: Any, request: Any) -> _Asked:
        return _Asked(method, request, method.future(request, timeout=RESTART_S, wait_for_ready=True))

    def _result(self, asked: _Asked) -> Any:
        """What a call gives; made again and again while replay cannot answer it."""
        begun_s = time.monotonic()
        is_told = False
        while True:
            try:
                return asked.call.result(timeout=_POLL_S)
            except grpc.FutureTimeoutError:
                if self._stop.is_set():
                    asked.call.cancel()
                    raise stopping.Stopped from None
            except grpc.RpcError as error:
                if time.monotonic() - begun_s >= _patience_s(error):
                    raise self._translated(error) from error
                if not is_told:
                    _log.warning("waiting for replay: %s", error.details())
                    is_told = True
                self._pause(_RETRY_S)
                asked.call = self._begin(asked.method, asked.request).call

    def _translated(self, error: grpc.RpcError) -> Exception:
        """What a person is told of a call that failed for good."""
        if error.code() in rpc.DISTRUST:
            return rpc.distrust(error, self._address)
        if error.code() not in _REFUSALS:
            return error
        mend = "see the log of replay; the newest checkpoint stands"
        return UserError(f"replay refuses this learner: {error.details()}", mend)

    def _fetch(self, hashes: Sequence[str], images: dict[str, bytes]) -> None:
        """Add screenshots to `images`; when the connection breaks on their way, those that are missing come again."""
        deadline_s = time.monotonic() + RESTART_S
        while missing := [name for name in hashes if name not in images]:
            request = replay_pb2.FetchImagesRequest(hashes=missing)
            try:
                for response in self._stub.FetchImages(request, timeout=RESTART_S, wait_for_ready=True):
                    images[response.image.hash] = response.image.data
            except grpc.RpcError as error:
                if rpc.code_of(error) is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline_s:
                    raise
                self._pause(_POLL_S)

    def _pause(self, pause_s: float) -> None:
        """Wait; a stop ends it."""
        self._stop.wait(pause_s)
        stopping.check(self._stop)


def _patience_s(error: grpc.RpcError) -> float:
    """How long a call that failed so is made again."""
    return {_FULL: FULL_S, grpc.StatusCode.UNAVAILABLE: RESTART_S}.get(rpc.code_of(error), 0.0)
