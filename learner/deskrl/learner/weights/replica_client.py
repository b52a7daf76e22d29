"""Replica client: updates the weights of one replica through its weight service."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace

import grpc

from deskrl.core import rpc
from deskrl.core.errors import UserError
from deskrl.core.timeouts import WaitFailed
from deskrl.core.weights import gpu_transfer
from deskrl.core.weights.buckets import BUCKET_BYTES
from deskrl.learner.weights.bucket_sender import BucketSender, SendResult
from deskrl.learner.weights.manifest import PublishOutcome, WeightManifest, WeightSnapshot, tensor_bytes
from deskrl.learner.weights.sender_transports import IpcTransport, NcclTransport, Transport
from deskrl.learner.weights.transport_choice import Endpoint, choose_transfer
from deskrl.learner.weights.update_stream import UpdateStream
from deskrl.proto.v1 import common_pb2, weights_pb2, weights_pb2_grpc

STALL_S = 120.0
"""Base timeout of an update in seconds; a streamed update has one more second for each `BYTES_PER_S`."""
BYTES_PER_S = 50 * 1024**2
_STATUS_TIMEOUT_S = 10.0

_TRANSIENT_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""Codes returned while a killed replica restarts; other errors would occur again."""

_log = logging.getLogger(__name__)


class ReplicaClient:
    """Client of one replica's weight service.

    Args:
        index: index of the replica.
        address: address of its service.
        requested_transfer: value of `inference.weight_transfer`.
        tolerance: largest accepted difference of a canary logprob.
        sender: bucket sender of this process if its weights are on a GPU, otherwise None.
    """

    def __init__(
        self, index: int, address: str, requested_transfer: str, tolerance: float, sender: BucketSender | None
    ) -> None:
        self.index = index
        self.address = address
        self.transfer = ""
        """Transfer chosen by the last negotiation: `ipc`, `nccl` or `stream`; empty before the first."""
        self._requested_transfer = requested_transfer
        self._tolerance = tolerance
        self._sender = sender
        self._channel = rpc.connect_sync(address)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self._nccl: NcclTransport | None = None
        self._has_joined = False

    def negotiate(self) -> weights_pb2.GetWeightStatusResponse | None:
        """Choose the transfer (`transfer`); return the replica's weight status if it was needed for that, else None.

        Raises:
            UserError: the configured transfer is not possible.
        """
        if self._requested_transfer == "stream" or (self._requested_transfer == "auto" and self._sender is None):
            self._set_transfer("stream")
            return None
        status = self._status()
        has_nccl = importlib.util.find_spec("vllm") is not None
        learner = Endpoint(gpu_transfer.host_id(), _gpu_uuids(self._sender), has_nccl)
        self._set_transfer(choose_transfer(self._requested_transfer, learner, Endpoint(status.host, status.gpu_uuids)))
        return status

    def served_version(self) -> common_pb2.PolicyVersion | None:
        """Return the policy version that the replica serves, or None if it does not respond."""
        try:
            return self._status().version
        except grpc.RpcError:
            return None

    def _status(self) -> weights_pb2.GetWeightStatusResponse:
        request = weights_pb2.GetWeightStatusRequest(peer=rpc.peer("learner", "rank-0"))
        status: weights_pb2.GetWeightStatusResponse = self._stub.GetWeightStatus(request, timeout=_STATUS_TIMEOUT_S)
        return status

    def _set_transfer(self, transfer: str) -> None:
        if transfer != self.transfer:
            _log.info("replica %d: weights are transferred by %s", self.index, transfer)
        self.transfer = transfer

    def stream(self, snapshot: WeightSnapshot, late: bool = False) -> PublishOutcome:
        """Update the replica by a stream of bytes; RPC errors are returned as a failed outcome.

        Args:
            snapshot: weights and their checksums.
            late: whether the update catches up a quarantined replica; recorded in the outcome.
        """
        manifest = snapshot.manifest
        stream = UpdateStream(self._stub, STALL_S + manifest.num_bytes / BYTES_PER_S)
        try:
            stream.send(begin=_begin(manifest))
            stream.expect("ready")
            for tensor in snapshot.tensors.values():
                data = tensor_bytes(tensor)
                for start in range(0, len(data), rpc.CHUNK_BYTES):
                    stream.send(chunk=bytes(data[start : start + rpc.CHUNK_BYTES]))
            return self.commit(manifest, stream, weights_pb2.UpdateCommit(), "stream", late)
        except grpc.RpcError as error:
            reason = rpc.describe_error(error)
            return self.failure(manifest, reason, "stream", late=late, may_recover=_is_transient(error))
        finally:
            stream.cancel()

    def open(self, manifest: WeightManifest) -> DirectUpdate | PublishOutcome | None:
        """Begin a direct update, up to the point where buckets can be sent.

        Returns:
            The open update, a failed outcome, or None if the replica must be updated by a stream.

        Raises:
            UserError: NCCL cannot connect learner and replica at the first attempt.
        """
        transfer = self.transfer
        try:
            status = self.negotiate()
            transfer = self.transfer
            if status is None or transfer == "stream":
                return None
            return self._open(manifest, status)
        except grpc.RpcError as error:
            return self.failure(manifest, rpc.describe_error(error), transfer, may_recover=_is_transient(error))
        except UserError as error:  # the replica has been restarted with other GPUs since the first negotiation
            return self.failure(manifest, str(error), transfer)
        except (WaitFailed, OSError, RuntimeError) as error:
            if transfer == "nccl" and not self._has_joined:
                hint = 'set NCCL_DEBUG=INFO and read its output, or set inference.weight_transfer = "stream"'
                raise UserError(f"NCCL cannot connect learner and replica {self.index}: {error}", hint) from error
            return self.failure(manifest, str(error), transfer, may_recover=True)

    def _open(self, manifest: WeightManifest, status: weights_pb2.GetWeightStatusResponse) -> DirectUpdate:
        assert self._sender is not None
        begin = _begin(manifest)
        begin.bucket_bytes = BUCKET_BYTES
        transport: IpcTransport | NcclTransport
        if self.transfer == "ipc":
            transport = IpcTransport(self._sender.handles())
            begin.ipc.socket_path = str(transport.path)
        else:
            transport = self._communicator(status)
            begin.nccl.communicator_id = transport.communicator_id
        stream = UpdateStream(self._stub, STALL_S)
        try:
            stream.send(begin=begin)
            stream.expect("ready")
            if isinstance(transport, NcclTransport):
                transport.is_possible = stream.is_active
                if transport.communicator_id != status.communicator_id:
                    transport.join()
                    self._has_joined = True
            return DirectUpdate(self, manifest, stream, transport, begin_ms=stream.elapsed_ms())
        except BaseException:
            stream.cancel()
            transport.abort()
            self.release_communicator()
            raise

    def _communicator(self, status: weights_pb2.GetWeightStatusResponse) -> NcclTransport:
        """Return the communicator that the replica is a member of, or a new one."""
        assert self._sender is not None
        if self._nccl is None or self._nccl.communicator_id != status.communicator_id:
            self.release_communicator()
            self._nccl = NcclTransport(self._sender.device, len(status.gpu_uuids))
        return self._nccl

    def release_communicator(self) -> None:
        """Destroy the communicator, if any; the next direct update creates a new one."""
        if self._nccl is not None:
            self._nccl.abort()
            self._nccl = None

    def commit(
        self,
        manifest: WeightManifest,
        stream: UpdateStream,
        commit: weights_pb2.UpdateCommit,
        transfer: str,
        late: bool,
    ) -> PublishOutcome:
        """Commit an update whose weights have all been sent, and compare the canary's logprobs."""
        received = stream.expect("received").received
        stream.send(commit=commit)
        committed = stream.expect("committed").committed
        stream.finish()
        pairs = zip(committed.canary_logprobs, manifest.canary_logprobs, strict=False)
        differences = [abs(theirs - ours) for theirs, ours in pairs]
        complete = len(committed.canary_logprobs) == len(manifest.canary_logprobs) and bool(differences)
        largest = max(differences, default=None)
        ok = complete and largest is not None and largest <= self._tolerance  # False if it is NaN
        return PublishOutcome(
            replica=self.index,
            version=manifest.version,
            ok=ok,
            transfer=transfer,
            error="" if ok else f"the canary differs by {largest}, more than the tolerance of {self._tolerance}",
            canary_max_difference=largest,
            receive_ms=received.receive_ms,
            total_ms=stream.elapsed_ms(),
            phases_ms=dict(committed.phases_ms),
            num_requests_kept=committed.num_requests_kept,
            late=late,
        )

    def failure(
        self, manifest: WeightManifest, reason: str, transfer: str, *, late: bool = False, may_recover: bool = False
    ) -> PublishOutcome:
        """Return the outcome of an update that was not completed."""
        return PublishOutcome(self.index, manifest.version, False, transfer, reason, late=late, may_recover=may_recover)

    def close(self) -> None:
        """Close the connection."""
        self.release_communicator()
        self._channel.close()


@dataclass
class DirectUpdate:
    """Update of one replica that is ready to receive buckets."""

    replica: ReplicaClient
    manifest: WeightManifest
    stream: UpdateStream
    transport: Transport
    begin_ms: float
    """Time until the replica was ready, in milliseconds; includes joining a new communicator."""

    def start(self) -> None:
        """Announce the first bucket to the replica."""
        self.stream.send(transfer=weights_pb2.UpdateTransfer())

    def conclude(self, result: SendResult) -> PublishOutcome:
        """Commit the update after all buckets were sent, or return the failure of its transfer."""
        transfer = self.replica.transfer
        commit = weights_pb2.UpdateCommit(checksums=result.checksums)
        error = result.errors.get(self.replica.index, "")
        try:
            if not error:
                outcome = self.replica.commit(self.manifest, self.stream, commit, transfer, late=False)
                phases_ms = {"begin": self.begin_ms, "transfer": result.transfer_s * 1e3}
                return replace(outcome, phases_ms=phases_ms | dict(outcome.phases_ms))
        except grpc.RpcError as failure:
            error = rpc.describe_error(failure)
        finally:
            self.stream.cancel()
        # A replica that fails at this point either restarts or recovers.
        self.replica.release_communicator()
        return self.replica.failure(self.manifest, error, transfer, may_recover=True)


def _begin(manifest: WeightManifest) -> weights_pb2.UpdateBegin:
    return weights_pb2.UpdateBegin(
        peer=rpc.peer("learner", "rank-0"),
        version=manifest.version,
        tensors=manifest.specs,
        canary=manifest.canary,
        model_fingerprint=manifest.processor_hash,
    )


def _is_transient(error: grpc.RpcError) -> bool:
    return rpc.status_code(error) in _TRANSIENT_CODES


def _gpu_uuids(sender: BucketSender | None) -> list[str]:
    return [] if sender is None else [sender.gpu_uuid]
