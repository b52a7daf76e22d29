"""Why a request is refused: each cause is a class with the gRPC status that callers see. Knows no store."""

import grpc


class Refused(Exception):
    """A request that changes nothing; its text names the cause."""

    code = grpc.StatusCode.INTERNAL


class OtherProtocol(Refused):
    """The caller speaks another version of the contracts."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Malformed(Refused):
    """The request contradicts the contract, whatever the state of the store."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class LeaseLost(Refused):
    """The lease ended otherwise than by its holder; the work has been granted again, or will be."""

    code = grpc.StatusCode.NOT_FOUND


class NotHeld(Refused):
    """Something named in the request is not in the store."""

    code = grpc.StatusCode.NOT_FOUND


class Conflict(Refused):
    """The request contradicts what the store holds by now."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class StoreFull(Refused):
    """The disk is full; nothing of the request was kept."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
