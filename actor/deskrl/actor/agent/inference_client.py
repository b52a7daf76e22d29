"""Inference client: samples actions from the replicas (`Act` of `inference.proto`).

The requests of one episode go to the same replica, which has cached its prefix and its screenshots. If that replica is
unavailable, another one is tried: replicas hold no state that a request depends on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import grpc
import grpc.aio

from deskrl.actor.backoff import TRANSIENT, Backoff
from deskrl.core import ids, rpc
from deskrl.core.config import InferenceConfig
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

_AVOIDED_FOR_S = 5.0
# The first attempt and one with all screenshots; the others are for replicas that fail in between.
_MAX_ATTEMPTS = 4
_log = logging.getLogger(__name__)


class InferenceError(RuntimeError):
    """No replica sampled an action in time, or the request was rejected."""


class _Replica:
    """Channel to one replica, and the time until which it is avoided because it failed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = rpc.connect(address, retry=False)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.avoided_until_s = 0.0


class InferenceClient:
    """Client of all replicas of the served policy.

    Args:
        config: addresses of the replicas, and maximum number of tokens of an action.
        name: name of this actor process.
        timeout_s: timeout in seconds for one action, including attempts on other replicas.
    """

    def __init__(self, config: InferenceConfig, name: str, timeout_s: float) -> None:
        self._peer = rpc.peer("actor", name)
        self._max_tokens = config.max_action_tokens
        self._timeout_s = timeout_s
        self._configured: tuple[str, ...] = tuple(config.replica_addresses)
        self._replicas: dict[str, _Replica] = {address: _Replica(address) for address in self._configured}
        self._closing: set[asyncio.Task[None]] = set()

    def open_session(self, episode_id: str, temperature: float) -> InferenceSession:
        """Return a session that samples the actions of one episode."""
        return InferenceSession(self, episode_id, temperature)

    def set_joined(self, addresses: Iterable[str]) -> None:
        """Set the replicas that have joined, in addition to the configured ones.

        Requests in progress on a replica that has left are repeated on another one.
        """
        wanted: set[str] = {*self._configured, *addresses}
        for address in self._replicas.keys() - wanted:
            _log.info("replica %s has left", address)
            closing = asyncio.create_task(self._replicas.pop(address).channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for address in sorted(wanted - self._replicas.keys()):
            _log.info("replica %s has joined", address)
            self._replicas[address] = _Replica(address)

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(replica.channel.close() for replica in self._replicas.values()), *self._closing)

    async def _act(
        self,
        request: inference_pb2.ActRequest,
        episode_id: str,
        images_for: Callable[[str], Sequence[common_pb2.Image]],
    ) -> tuple[str, inference_pb2.ActResponse]:
        """Send a request to the episode's preferred replica, then to the others, until one responds.

        Args:
            request: request without screenshots.
            episode_id: episode that the request belongs to.
            images_for: returns the screenshots to be sent to the replica at an address.

        Returns:
            Address of the replica, and its response.
        """
        deadline_s = time.monotonic() + self._timeout_s
        backoff = Backoff()
        reason = "no replica has joined"
        while (left_s := deadline_s - time.monotonic()) > 0:
            replica = self._choose_replica(episode_id)
            if replica is None:
                await backoff.sleep()
                continue
            del request.images[:]
            request.images.extend(images_for(replica.address))
            try:
                return replica.address, await replica.stub.Act(request, timeout=left_s)
            except grpc.aio.AioRpcError as error:
                reason = f"{replica.address}: {rpc.describe_error(error)}"
                if (rejection := rpc.rejection_error(error, replica.address)) is not None:
                    raise rejection from error
                if rpc.status_code(error) not in TRANSIENT:
                    raise InferenceError(reason) from error
            if backoff.is_first:
                _log.warning("no action was sampled: %s", reason)
                await asyncio.to_thread(rpc.check_health, replica.address)  # raises if no retry can succeed
            replica.avoided_until_s = time.monotonic() + _AVOIDED_FOR_S
            await backoff.sleep()
        raise InferenceError(f"no action within {self._timeout_s:g} s; last error: {reason}")

    def _choose_replica(self, episode_id: str) -> _Replica | None:
        """Return the first replica in the episode's order that has not failed recently; None if there is none.

        If all have failed recently, the one that failed first is tried again. Each episode orders all replicas by a
        hash of episode and address (rendezvous hashing), so when a replica joins or leaves, most episodes keep their
        replica and with it their cached prefix and screenshots.
        """
        now_s = time.monotonic()

        def preference(replica: _Replica) -> tuple[float, int]:
            return max(replica.avoided_until_s - now_s, 0.0), ids.derive_seed("replica", episode_id, replica.address)

        return min(self._replicas.values(), key=preference, default=None)


class InferenceSession:
    """Samples the actions of one episode, and sends each screenshot to a replica only once.

    Args:
        client: client of the replicas.
        episode_id: episode that the actions belong to.
        temperature: sampling temperature.
    """

    def __init__(self, client: InferenceClient, episode_id: str, temperature: float) -> None:
        self._client = client
        self._episode_id = episode_id
        self._temperature = temperature
        self._images: dict[str, common_pb2.Image] = {}
        self._sent: set[tuple[str, str]] = set()

    async def act(
        self, messages: Sequence[inference_pb2.ChatMessage], screenshot: common_pb2.Image, seed: int
    ) -> inference_pb2.SampledAction:
        """Sample the next action.

        Args:
            messages: whole conversation. Its screenshots are `screenshot`, those of earlier calls and those added.
            screenshot: newest screenshot.
            seed: sampling seed.

        Raises:
            InferenceError: no action was sampled before the deadline, or the request was rejected.
        """
        self.add_image(screenshot)
        named = _named_images(messages)
        self._images = {name: image for name, image in self._images.items() if name in named}
        request = inference_pb2.ActRequest(
            peer=self._client._peer,
            request_id=ids.new_id("act"),
            messages=messages,
            temperature=self._temperature,
            max_tokens=self._client._max_tokens,
            seed=seed,
        )
        for _ in range(_MAX_ATTEMPTS):
            address, response = await self._client._act(request, self._episode_id, self._unsent)
            self._sent.update((address, name) for name in named)
            if response.WhichOneof("outcome") == "action":
                return response.action
            missing = set(response.missing_images.hashes)
            if not missing <= self._images.keys():
                raise InferenceError(f"{address} requested screenshots outside the conversation: {missing - named}")
            # Send all of them again. If only the missing ones were sent, a full cache could evict one for another.
            self._sent -= {(address, name) for name in named}
        raise InferenceError(f"screenshots are still missing after they were sent {_MAX_ATTEMPTS - 1} times")

    def add_image(self, image: common_pb2.Image) -> None:
        """Add a screenshot that later conversations contain."""
        self._images[image.hash] = image

    def _unsent(self, address: str) -> list[common_pb2.Image]:
        """Return the screenshots that were not yet sent to a replica."""
        return [image for name, image in self._images.items() if (address, name) not in self._sent]


def _named_images(messages: Sequence[inference_pb2.ChatMessage]) -> set[str]:
    return {
        content.image_hash
        for message in messages
        for content in message.contents
        if content.WhichOneof("kind") == "image_hash"
    }
