"""An actor's side of `Act`: which replica is asked, which screenshots it is sent, and when it counts as unreachable.

Knows the contract of `inference.proto`; knows no prompt and no desktop. An episode keeps asking one replica, which
then holds its prefix and its screenshots; when that one is away the next is asked, for a server holds no session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import grpc
import grpc.aio

from deskrl.actor.retries import TRANSIENT, Pauses
from deskrl.core import ids, rpc
from deskrl.core.config import InferenceConfig
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

_AVOIDED_FOR_S = 5.0
# The first request, and one with all screenshots; the rest is for replicas that fail in between.
_MAX_ROUNDS = 4
_log = logging.getLogger(__name__)


class InferenceFailed(RuntimeError):
    """No action could be had from any replica in time, or the request was refused."""


class _Replica:
    """One server, with when it last failed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = rpc.connect(address, retry=False)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.avoided_until_s = 0.0


class PolicyClient:
    """The served policy, behind all its replicas.

    Args:
        config: where the replicas listen.
        name: of this actor process.
        timeout_s: how long one action may take, tries on other replicas included.
    """

    def __init__(self, config: InferenceConfig, name: str, timeout_s: float) -> None:
        self._peer = rpc.peer("actor", name)
        self._max_tokens = config.max_action_tokens
        self._timeout_s = timeout_s
        self._named = tuple(config.replica_addresses)
        self._replicas = {address: _Replica(address) for address in self._named}
        self._closing: set[asyncio.Task[None]] = set()

    def open_session(self, episode_id: str, temperature: float) -> PolicySession:
        """What asks for the actions of one episode."""
        return PolicySession(self, episode_id, temperature)

    def set_joined(self, addresses: Iterable[str]) -> None:
        """From now on these replicas, beside those that the configuration names; what is asked of others goes over."""
        wanted = {*self._named, *addresses}
        for address in self._replicas.keys() - wanted:
            _log.info("the replica at %s has left", address)
            closing = asyncio.create_task(self._replicas.pop(address).channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for address in sorted(wanted - self._replicas.keys()):
            _log.info("a replica at %s has joined", address)
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
        """Ask the episode's home, then the others in turn, until one answers; also says which one did."""
        deadline_s = time.monotonic() + self._timeout_s
        pauses = Pauses()
        reason = "that there is no replica"
        while (left_s := deadline_s - time.monotonic()) > 0:
            replica = self._choose(episode_id)
            if replica is None:
                await pauses.take()
                continue
            del request.images[:]
            request.images.extend(images_for(replica.address))
            try:
                return replica.address, await replica.stub.Act(request, timeout=left_s)
            except grpc.aio.AioRpcError as error:
                reason = f"{replica.address}: {error.code().name}: {error.details()}"
                if error.code() in rpc.DISTRUST:
                    raise rpc.distrust(error, replica.address) from error
                if rpc.code_of(error) not in TRANSIENT:
                    raise InferenceFailed(reason) from error
            if pauses.are_new:
                _log.warning("no action from %s", reason)
                await asyncio.to_thread(rpc.check_health, replica.address)  # it may be that there never will be one
            replica.avoided_until_s = time.monotonic() + _AVOIDED_FOR_S
            await pauses.take()
        raise InferenceFailed(f"no action within {self._timeout_s:g} s; the last answer was {reason}")

    def _choose(self, episode_id: str) -> _Replica | None:
        """The episode's home, or the next one that has not failed just now; home again if all have; None if none is.

        Each episode has an order of its own over all replicas, which one that joins or leaves does not change: most
        episodes keep their home, and with it their prefix and screenshots.
        """
        now_s = time.monotonic()

        def preference(replica: _Replica) -> tuple[float, int]:
            return max(replica.avoided_until_s - now_s, 0.0), ids.derive_seed("replica", episode_id, replica.address)

        return min(self._replicas.values(), key=preference, default=None)


class PolicySession:
    """Actions of one episode. Remembers which replica was sent which screenshot; the server may still forget."""

    def __init__(self, client: PolicyClient, episode_id: str, temperature: float) -> None:
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
            messages: the whole conversation; screenshots in it were given to this session before, or are `screenshot`.
            screenshot: the newest one.
            seed: of the sampling.

        Raises:
            InferenceFailed: no action within the deadline.
        """
        self._images[screenshot.hash] = screenshot
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
        for _ in range(_MAX_ROUNDS):
            address, response = await self._client._act(request, self._episode_id, self._unsent)
            self._sent.update((address, name) for name in named)
            if response.WhichOneof("outcome") == "action":
                return response.action
            missing = set(response.missing_images.hashes)
            if not missing <= self._images.keys():
                raise InferenceFailed(f"asked for screenshots that the conversation lacks: {missing - named}")
            # All of them go again: a full cache may have dropped one for another, and this way it needs none.
            self._sent -= {(address, name) for name in named}
        raise InferenceFailed(f"screenshots were still missing after they were sent {_MAX_ROUNDS - 1} times")

    def _unsent(self, address: str) -> list[common_pb2.Image]:
        """The screenshots that a replica is not known to hold."""
        return [image for name, image in self._images.items() if (address, name) not in self._sent]


def _named_images(messages: Sequence[inference_pb2.ChatMessage]) -> set[str]:
    return {
        content.image_hash
        for message in messages
        for content in message.contents
        if content.WhichOneof("kind") == "image_hash"
    }
