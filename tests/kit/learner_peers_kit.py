"""Peers of a learner under test: an inference replica and an actor for the toy task.

The replica is a gRPC server that receives and verifies weights; it can be made to reject updates, to be unavailable or
to report wrong canary logprobs. The actor is a thread that leases rollouts from a real replay service and samples with
the weights that the replica committed last.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from learner_kit import ToyPolicy, demonstrate, run_episode
from replay_kit import ReplayClient, begin, image, result
from safetensors.torch import save_file

from deskrl.core import ids
from deskrl.core.security.peer_identity import Identity
from deskrl.core.step_codec import Step, encode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2, weights_pb2, weights_pb2_grpc

_LOADING = threading.Lock()
"""Serialises the loading of models, during which transformers patches torch.nn.init."""


class ToyReplica(weights_pb2_grpc.WeightServiceServicer):
    """Inference replica that serves its weights with transformers.

    Args:
        address: address to listen on, as host:port.
        model_folder: folder of the initial model.
        scratch: folder for received weights.
        identity: identity of the replica, if the run uses certificates.
    """

    def __init__(self, address: str, model_folder: Path, scratch: Path, identity: Identity | None = None) -> None:
        self.address = address
        self._model_folder = model_folder
        self._scratch = scratch
        self.policy: ToyPolicy | None = None
        self.version = ("", 0)
        self.versions: list[tuple[str, int]] = []
        self.rejects = threading.Event()
        self.is_unavailable = threading.Event()
        self.has_wrong_canary = threading.Event()
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4))
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self, self._server)
        healthy = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, self._server)
        healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        if identity is None:
            self._server.add_insecure_port(address)
        else:
            pair = (identity.key, identity.certificate)
            credentials = grpc.ssl_server_credentials([pair], identity.ca, require_client_auth=True)
            self._server.add_secure_port(address, credentials)
        self._server.start()

    def UpdateWeights(
        self, requests: Iterator[weights_pb2.UpdateWeightsRequest], context: Any
    ) -> Iterator[weights_pb2.UpdateWeightsResponse]:
        begun = next(requests).begin
        if self.rejects.is_set():
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "rejected by the test")
        if self.is_unavailable.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "unavailable for the test")
        yield weights_pb2.UpdateWeightsResponse(ready=weights_pb2.UpdateReady())
        data = bytearray()
        while len(data) < sum(spec.num_bytes for spec in begun.tensors):
            data += next(requests).chunk
        tensors = _split(data, begun.tensors)
        yield weights_pb2.UpdateWeightsResponse(received=weights_pb2.UpdateReceived(receive_ms=1.0))
        assert next(requests).WhichOneof("event") == "commit"
        policy = self._load(tensors)
        version = (begun.version.lineage, begun.version.step)
        with self._lock:
            self.policy, self.version = policy, version
            self.versions.append(version)
        committed = weights_pb2.UpdateCommitted(
            version=begun.version, canary_logprobs=self._canary(policy, begun.canary), phases_ms={"load": 1.0}
        )
        yield weights_pb2.UpdateWeightsResponse(committed=committed)

    def GetWeightStatus(
        self, request: weights_pb2.GetWeightStatusRequest, context: Any
    ) -> weights_pb2.GetWeightStatusResponse:
        with self._lock:
            lineage, step = self.version
        version = common_pb2.PolicyVersion(lineage=lineage, step=step)
        return weights_pb2.GetWeightStatusResponse(version=version, state="serving")

    def restart(self) -> None:
        """Serve the initial weights, as after a crash."""
        with self._lock:
            self.version = ("", 0)

    def served(self) -> tuple[ToyPolicy, tuple[str, int]]:
        with self._lock:
            assert self.policy is not None
            return self.policy, self.version

    def close(self) -> None:
        self._server.stop(None).wait()

    def _load(self, tensors: dict[str, torch.Tensor]) -> ToyPolicy:
        """Load weights from a model folder: published weights must load like any checkpoint."""
        folder = self._scratch / ids.new_id("served")
        shutil.copytree(self._model_folder, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with _LOADING:
            policy = ToyPolicy(folder)
        shutil.rmtree(folder)
        return policy

    def _canary(self, policy: ToyPolicy, canary: weights_pb2.Canary) -> list[float]:
        prompt, continuation = policy.prompt_ids(canary.messages), list(canary.continuation_ids)
        rows = policy.logprobs([*prompt, *continuation], [picture.data for picture in canary.images], suppress=False)
        at = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        logprobs = [float(rows[position, token]) for position, token in zip(at, continuation, strict=True)]
        return [value - 0.5 for value in logprobs] if self.has_wrong_canary.is_set() else logprobs


def _split(data: bytes | bytearray, specs: Any) -> dict[str, torch.Tensor]:
    tensors, offset = {}, 0
    for spec in specs:
        part = bytes(data[offset : offset + spec.num_bytes])
        assert hashlib.sha256(part).hexdigest() == spec.checksum
        tensors[spec.name] = torch.frombuffer(bytearray(part), dtype=getattr(torch, spec.dtype)).view(*spec.shape)
        offset += spec.num_bytes
    return tensors


class ToyActor:
    """Actor in a thread: leases rollouts and runs them until it is closed.

    Args:
        client: client of the replay service.
        replica: replica whose weights sample the actions.
        reward_of: reward of a sampled rollout; None: the reward of the toy task.
    """

    def __init__(
        self,
        client: ReplayClient,
        replica: ToyReplica,
        reward_of: Callable[[rollout_pb2.Rollout], float] | None = None,
    ) -> None:
        self._client = client
        self._replica = replica
        self._reward_of = reward_of
        self._closed = threading.Event()
        self.num_episodes = 0
        self._thread = threading.Thread(target=self._run, name="toy-actor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                lease = self._client.acquire(wait_s=1.0)
            except grpc.RpcError:  # the service is unavailable while a test restarts it
                self._closed.wait(0.2)
                continue
            if lease.lease_id:
                self._run_rollout(lease)
                self.num_episodes += 1

    def _run_rollout(self, lease: rollout_pb2.AcquireLeaseResponse) -> None:
        rollout = lease.rollout
        if rollout.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED:
            steps, shots, reward = demonstrate(rollout.task_id)
        else:
            policy, version = self._replica.served()
            steps, shots, reward = run_episode(policy, rollout.task_id, rollout.seed, version, rollout.max_steps)
            if self._reward_of is not None:
                reward = self._reward_of(rollout)
        self._client.stream(episode_requests(lease, steps, shots, reward))


def episode_requests(
    lease: rollout_pb2.AcquireLeaseResponse, steps: list[Step], shots: list[bytes], reward: float
) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    """Yield the requests with which an actor streams an episode."""
    yield begin(lease)
    for step, shot in zip(steps, shots, strict=True):
        payload = encode_step(step)
        message = rollout_pb2.EpisodeStep(index=step.index, image_hashes=step.images, payload=payload)
        yield rollout_pb2.StreamEpisodeRequest(step=message, images=[image(shot)])
    yield result(reward, len(steps))
