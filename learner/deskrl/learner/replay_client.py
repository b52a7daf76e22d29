"""The learner's client of the replay service: plans, groups, commits and screenshots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import grpc

from deskrl.core import rpc
from deskrl.core.errors import UserError
from deskrl.core.lru_cache import SharedLRUCache
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner import cancellation, retrying_calls
from deskrl.learner.retrying_calls import PendingCall, RetryingCalls
from deskrl.proto.v1 import common_pb2, directory_pb2, directory_pb2_grpc, replay_pb2, replay_pb2_grpc

WAIT_S = 2.0
"""How long the service waits for a group before it answers a TakeGroup call without one."""
IMAGE_CACHE_BYTES = 1024**3
"""Size of the cache of encoded screenshots: about those of a batch of 256 episodes."""
NUM_CALLS_AHEAD = 4
"""TakeGroup calls in flight: the service prepares the next groups, on its disk, while one is decoded here."""
_FATAL = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""Errors that need the user: another protocol version, a store that contradicts this learner, a full disk."""


_DAMAGED = {grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND}
"""Errors of damaged screenshots: the rank whose request finds the damage gets the first one, others the second."""


class EpisodesDamagedError(RuntimeError):
    """The replay service found screenshots damaged on its disk; it plays the episodes with them again."""


class ReplayClient:
    """Calls the replay service on behalf of one rank.

    Unary calls are retried while the service restarts or its disk is full (see `retrying_calls`).

    Args:
        address: address of the replay service, as host:port.
        name: name of this rank, for the service's log.
        stop: event on which waiting calls raise `Stopped`.
    """

    def __init__(self, address: str, name: str, stop: StopEvent) -> None:
        self._address = address
        self._channel = rpc.connect_sync(address)
        self._stub = replay_pb2_grpc.ReplayServiceStub(self._channel)
        self._directory = directory_pb2_grpc.DirectoryServiceStub(self._channel)
        self._peer = rpc.peer("learner", name)
        self._stop = stop
        self._calls = RetryingCalls("replay", stop)
        self._images: SharedLRUCache[bytes] = SharedLRUCache(IMAGE_CACHE_BYTES, len)
        """Recent screenshots by hash: several micro-batches of a batch show the same ones."""

    def plan(self, groups: Sequence[replay_pb2.GroupPlan]) -> None:
        """Plan groups; groups that exist already are unchanged."""
        for part in rpc.split_by_size(groups):
            self._call(self._stub.PlanGroups, replay_pb2.PlanGroupsRequest(peer=self._peer, groups=part))

    def set_policy_version(self, version: common_pb2.PolicyVersion, num_updates: int) -> None:
        """Report the policy version that acts from now on."""
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
        """Yield the groups of a batch in order, waiting for each without a limit.

        Args:
            queue: queue to take the groups from.
            batch_id: id of the batch.
            ordinals: positions in the batch; a few are requested ahead, so all of them must be needed.
            dropped: function that returns the ids of all groups of the batch that were dropped so far.
            while_waiting: called whenever the next group has not arrived for `WAIT_S`.
        """

        def start(ordinal: int) -> tuple[int, PendingCall]:
            request = replay_pb2.TakeGroupRequest(
                peer=self._peer,
                queue=queue,
                batch_id=batch_id,
                ordinal=ordinal,
                wait_s=WAIT_S,
                dropped_group_ids=dropped(),
            )
            return ordinal, self._calls.start(self._stub.TakeGroup, request)

        remaining = iter(ordinals)
        pending = deque(start(ordinal) for ordinal in islice(remaining, NUM_CALLS_AHEAD))
        try:
            while pending:
                ordinal, call = pending[0]
                response: replay_pb2.TakeGroupResponse = self._result(call)
                if not response.HasField("group"):
                    while_waiting()
                    pending[0] = start(ordinal)
                    continue
                pending.popleft()
                yield response.group
                pending.extend(start(following) for following in islice(remaining, 1))
        finally:
            for _, call in pending:
                call.cancel()

    def commit(
        self,
        queue: str,
        batch_id: str,
        verdicts: Sequence[replay_pb2.GroupVerdict],
        version: common_pb2.PolicyVersion,
    ) -> None:
        """Commit a batch that is contained in a checkpoint on disk."""
        request = replay_pb2.CommitBatchRequest(
            peer=self._peer, queue=queue, batch_id=batch_id, verdicts=verdicts, version=version
        )
        self._call(self._stub.CommitBatch, request)

    def fetch_images(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return encoded screenshots by hash; those in the cache are not requested again.

        Raises:
            EpisodesDamagedError: a screenshot is damaged or no longer stored.
            RuntimeError: the service cannot answer.
        """
        wanted = set(hashes)
        cancellation.check(self._stop)
        images = {name: data for name in wanted if (data := self._images.get(name)) is not None}
        if missing := sorted(wanted.difference(images)):
            self._fetch(missing, images)
        for name, data in images.items():
            self._images[name] = data
        return images

    def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Return the counters of the service."""
        response: replay_pb2.GetReplayStatusResponse = self._call(
            self._stub.GetReplayStatus, replay_pb2.GetReplayStatusRequest()
        )
        return response

    def num_closed_train_groups(self) -> int:
        """Return the number of planned training groups that faults have closed, which will never be taken."""
        return int(self.status().dropped.get("faults", 0))

    def joined_replicas(self) -> list[str]:
        """Return the addresses of the inference replicas that have joined the run.

        Raises:
            grpc.RpcError: the service is unavailable.
        """
        request = directory_pb2.ListReplicasRequest(peer=self._peer)
        listed: directory_pb2.ListReplicasResponse = self._directory.ListReplicas(request, timeout=rpc.UNARY_TIMEOUT_S)
        return [replica.address for replica in listed.replicas]

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, method: Any, request: Any) -> Any:
        return self._result(self._calls.start(method, request))

    def _result(self, call: PendingCall) -> Any:
        try:
            return self._calls.result(call)
        except grpc.RpcError as error:
            raise self._as_user_error(error) from error

    def _as_user_error(self, error: grpc.RpcError) -> Exception:
        """Return a UserError for errors that need the user, otherwise the error itself."""
        if (rejection := rpc.rejection_error(error, self._address)) is not None:
            return rejection
        if error.code() not in _FATAL:
            return error
        hint = "see the log of replay; the newest checkpoint is kept"
        return UserError(f"replay rejected this learner: {error.details()}", hint)

    def _fetch(self, hashes: Sequence[str], images: dict[str, bytes]) -> None:
        """Add screenshots to `images`; after a broken connection, those that are still missing are requested again."""
        timeout_s = retrying_calls.RESTART_TIMEOUT_S
        deadline_s = time.monotonic() + timeout_s
        while missing := [name for name in hashes if name not in images]:
            request = replay_pb2.FetchImagesRequest(hashes=missing)
            try:
                for response in self._stub.FetchImages(request, timeout=timeout_s, wait_for_ready=True):
                    images[response.image.hash] = response.image.data
            except grpc.RpcError as error:
                code = rpc.status_code(error)
                if code in _DAMAGED:
                    raise EpisodesDamagedError(f"replay: {error.details()}") from None
                if code is not grpc.StatusCode.UNAVAILABLE:
                    raise RuntimeError(f"replay does not serve screenshots: {code.name}: {error.details()}") from None
                if time.monotonic() > deadline_s:
                    raise
                self._calls.pause(retrying_calls.POLL_INTERVAL_S)
