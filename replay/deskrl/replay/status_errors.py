"""Errors of the replay service, each class with the gRPC status that callers receive."""

import grpc


class StatusError(Exception):
    """Rejected request that has changed nothing; its text names the cause."""

    code = grpc.StatusCode.INTERNAL


class ProtocolMismatchError(StatusError):
    """The caller speaks another version of the protocol."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class InvalidRequestError(StatusError):
    """The request violates the protocol, whatever the state of the store."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class LeaseNotFoundError(StatusError):
    """The lease does not exist, has expired or was released; its rollout is or will be granted again."""

    code = grpc.StatusCode.NOT_FOUND


class NotFoundError(StatusError):
    """The store does not hold something that the request names."""

    code = grpc.StatusCode.NOT_FOUND


class ConflictError(StatusError):
    """The request conflicts with the present state of the store."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class StoreDamagedError(StatusError):
    """The store is damaged beyond single episodes, and the service ends."""

    code = grpc.StatusCode.UNAVAILABLE


class EpisodeDamagedError(StatusError):
    """Episodes that the request needs are damaged; they were set aside, and are played again if they are needed."""

    code = grpc.StatusCode.DATA_LOSS


class StoreFullError(StatusError):
    """The disk is full; nothing of the request was stored."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
