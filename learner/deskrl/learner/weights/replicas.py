"""One replica, as the learner talks to it of weights: what is sent, what must be answered, and what became of it.

Knows the stream of weights.proto from the learner's side; knows nothing of training, nor of other replicas.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace

import grpc

from deskrl.core import rpc
from deskrl.core.bounds import GaveUp
from deskrl.core.errors import UserError
from deskrl.core.weights import direct
from deskrl.core.weights.buckets import BUCKET_BYTES
from deskrl.learner.weights.announcements import Announcement, Outcome, Snapshot, bytes_of
from deskrl.learner.weights.channels import Channel, IpcChannel, NcclChannel
from deskrl.learner.weights.negotiation import Side, choose_transfer
from deskrl.learner.weights.sending import Sender, Sent
from deskrl.learner.weights.talk import Talk
from deskrl.proto.v1 import common_pb2, weights_pb2, weights_pb2_grpc

STALL_S = 120.0
"""An update that takes longer than this and a second for each `BYTES_PER_S` has stalled."""
BYTES_PER_S = 50 * 1024**2
_STATUS_S = 10.0

_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""What a replica that was killed and is restarted answers; anything else it would answer again."""

_log = logging.getLogger("deskrl.learner")


class Replica:
    """The connection to one replica.

    Args:
        index: of the replica.
        address: of its service.
        asked: `inference.weight_transfer`.
        tolerance: for the canary.
        sender: of this process, if its weights are on a GPU.
    """

    def __init__(self, index: int, address: str, asked: str, tolerance: float, sender: Sender | None) -> None:
        self.index = index
        self.address = address
        self.transfer = ""
        """How weights went last."""
        self._asked = asked
        self._tolerance = tolerance
        self._sender = sender
        self._channel = rpc.connect_sync(address)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self._nccl: NcclChannel | None = None
        self._has_joined = False

    def negotiate(self) -> weights_pb2.GetWeightStatusResponse | None:
        """Settle how weights go to the replica as it is now: `transfer`; what it said of itself, if it was asked.

        Raises:
            UserError: what the configuration asks for cannot be had.
        """
        if self._asked == "stream" or (self._asked == "auto" and self._sender is None):
            self._settle("stream")
            return None
        status = self._status()
        here = Side(direct.host_name(), _gpu_uuids(self._sender), importlib.util.find_spec("vllm") is not None)
        self._settle(choose_transfer(self._asked, here, Side(status.host, status.gpu_uuids)))
        return status

    def served_version(self) -> common_pb2.PolicyVersion | None:
        """The version that acts there; None if it does not say."""
        try:
            return self._status().version
        except grpc.RpcError:
            return None

    def _status(self) -> weights_pb2.GetWeightStatusResponse:
        request = weights_pb2.GetWeightStatusRequest(peer=rpc.peer("learner", "rank-0"))
        status: weights_pb2.GetWeightStatusResponse = self._stub.GetWeightStatus(request, timeout=_STATUS_S)
        return status

    def _settle(self, transfer: str) -> None:
        if transfer != self.transfer:
            _log.info("weights go to replica %d by %s", self.index, transfer)
        self.transfer = transfer

    def stream(self, snapshot: Snapshot, late: bool = False) -> Outcome:
        """One update as a stream of bytes, from begin to the canary's comparison; never raises for the replica."""
        announcement = snapshot.announcement
        timeout_s = STALL_S + announcement.num_bytes / BYTES_PER_S
        talk = Talk(self._stub, timeout_s)
        try:
            talk.send(begin=_begin(announcement))
            talk.expect("ready")
            for tensor in snapshot.tensors.values():
                data = bytes_of(tensor)
                for start in range(0, len(data), rpc.CHUNK_BYTES):
                    talk.send(chunk=bytes(data[start : start + rpc.CHUNK_BYTES]))
            return self.conclude(announcement, talk, weights_pb2.UpdateCommit(), "stream", late)
        except grpc.RpcError as error:
            return self.failed(announcement, _reason(error), "stream", late=late, may_recover=_passes(error))
        finally:
            talk.end()

    def open(self, announcement: Announcement) -> DirectUpdate | Outcome | None:
        """Begin a direct update, up to the point where buckets may be sent; None if weights go as a stream.

        Raises:
            UserError: NCCL has never connected learner and replica, and does not now.
        """
        transfer = self.transfer
        try:
            status = self.negotiate()
            transfer = self.transfer
            if status is None or transfer == "stream":
                return None
            return self._open(announcement, status)
        except grpc.RpcError as error:
            return self.failed(announcement, _reason(error), transfer, may_recover=_passes(error))
        except UserError as error:  # it was another one, with other GPUs, when weights first went to it
            return self.failed(announcement, str(error), transfer)
        except (GaveUp, OSError, RuntimeError) as error:
            if transfer == "nccl" and not self._has_joined:
                mend = 'see what NCCL_DEBUG=INFO says, or set inference.weight_transfer = "stream"'
                raise UserError(f"NCCL does not connect learner and replica {self.index}: {error}", mend) from error
            return self.failed(announcement, str(error), transfer, may_recover=True)

    def _open(self, announcement: Announcement, status: weights_pb2.GetWeightStatusResponse) -> DirectUpdate:
        assert self._sender is not None
        begin = _begin(announcement)
        begin.bucket_bytes = BUCKET_BYTES
        channel: IpcChannel | NcclChannel
        if self.transfer == "ipc":
            channel = IpcChannel(self._sender.handles())
            begin.ipc.socket_path = str(channel.path)
        else:
            channel = self._communicator(status)
            begin.nccl.communicator_id = channel.communicator_id
        talk = Talk(self._stub, STALL_S)
        try:
            talk.send(begin=begin)
            talk.expect("ready")
            if isinstance(channel, NcclChannel):
                channel.is_possible = talk.is_active
                if channel.communicator_id != status.communicator_id:
                    channel.join()
                    self._has_joined = True
            return DirectUpdate(self, announcement, talk, channel, begin_ms=talk.elapsed_ms())
        except BaseException:
            talk.end()
            channel.abort()
            self.drop_communicator()
            raise

    def _communicator(self, status: weights_pb2.GetWeightStatusResponse) -> NcclChannel:
        """The communicator that the replica is in, or a new one."""
        assert self._sender is not None
        if self._nccl is None or self._nccl.communicator_id != status.communicator_id:
            self.drop_communicator()
            self._nccl = NcclChannel(self._sender.device, len(status.gpu_uuids))
        return self._nccl

    def drop_communicator(self) -> None:
        """Let go of the communicator; the next direct update makes another."""
        if self._nccl is not None:
            self._nccl.abort()
            self._nccl = None

    def conclude(
        self, announcement: Announcement, talk: Talk, commit: weights_pb2.UpdateCommit, transfer: str, late: bool
    ) -> Outcome:
        """From the last byte to the canary's comparison."""
        received = talk.expect("received").received
        talk.send(commit=commit)
        committed = talk.expect("committed").committed
        talk.finish()
        pairs = zip(committed.canary_logprobs, announcement.canary_logprobs, strict=False)
        differences = [abs(theirs - ours) for theirs, ours in pairs]
        complete = len(committed.canary_logprobs) == len(announcement.canary_logprobs) and bool(differences)
        largest = max(differences, default=None)
        ok = complete and largest is not None and largest <= self._tolerance  # a NaN compares as False
        return Outcome(
            replica=self.index,
            version=announcement.version,
            ok=ok,
            transfer=transfer,
            error="" if ok else f"its canary differs by {largest} where {self._tolerance} is allowed",
            canary_max_difference=largest,
            receive_ms=received.receive_ms,
            total_ms=talk.elapsed_ms(),
            phases_ms=dict(committed.phases_ms),
            num_requests_kept=committed.num_requests_kept,
            late=late,
        )

    def failed(
        self, announcement: Announcement, reason: str, transfer: str, *, late: bool = False, may_recover: bool = False
    ) -> Outcome:
        """What became of an update that did not get to its end."""
        return Outcome(self.index, announcement.version, False, transfer, reason, late=late, may_recover=may_recover)

    def close(self) -> None:
        """End the connection."""
        self.drop_communicator()
        self._channel.close()


@dataclass
class DirectUpdate:
    """One replica that waits for buckets."""

    replica: Replica
    announcement: Announcement
    talk: Talk
    channel: Channel
    begin_ms: float
    """Until it was ready; a communicator that had to be joined included."""

    def start(self) -> None:
        """Tell the replica that the first bucket is on its way."""
        self.talk.send(transfer=weights_pb2.UpdateTransfer())

    def conclude(self, sent: Sent) -> Outcome:
        """From the last bucket to the canary's comparison."""
        transfer = self.replica.transfer
        commit = weights_pb2.UpdateCommit(checksums=sent.checksums)
        error = sent.errors.get(self.replica.index, "")
        try:
            if not error:
                outcome = self.replica.conclude(self.announcement, self.talk, commit, transfer, late=False)
                phases_ms = {"begin": self.begin_ms, "transfer": sent.moving_s * 1e3}
                return replace(outcome, phases_ms=phases_ms | dict(outcome.phases_ms))
        except grpc.RpcError as failure:
            error = _reason(failure)
        finally:
            self.talk.end()
        # Whatever is wrong with a replica in the middle of this, it is restarted or comes round by itself.
        self.replica.drop_communicator()
        return self.replica.failed(self.announcement, error, transfer, may_recover=True)


def _begin(announcement: Announcement) -> weights_pb2.UpdateBegin:
    return weights_pb2.UpdateBegin(
        peer=rpc.peer("learner", "rank-0"),
        version=announcement.version,
        tensors=announcement.specs,
        canary=announcement.canary,
        model_fingerprint=announcement.processor_hash,
    )


def _passes(error: grpc.RpcError) -> bool:
    return rpc.code_of(error) in _PASSING


def _reason(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _gpu_uuids(sender: Sender | None) -> list[str]:
    return [] if sender is None else [sender.gpu_uuid]
