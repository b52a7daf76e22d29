"""Unary gRPC calls that are retried while the service restarts or its disk is full, and that a stop event cancels.

Hand-written because a call in flight has to be polled for the stop event; retry libraries only see finished attempts.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import grpc

from deskrl.core import rpc
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner import cancellation

RESTART_TIMEOUT_S = 60.0
"""How long calls are retried while the service is unavailable."""
DISK_FULL_TIMEOUT_S = 3600.0
"""How long calls are retried while the service's disk is full."""
POLL_INTERVAL_S = 0.2
"""Interval at which a call in flight is polled for the stop event."""
_RETRY_INTERVAL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass
class PendingCall:
    """A unary call in progress."""

    method: Any
    request: Any
    future: Any

    def cancel(self) -> None:
        """Cancel the call."""
        self.future.cancel()


class RetryingCalls:
    """Makes unary calls to one service.

    Args:
        service: name of the service, for log messages.
        stop: event that cancels calls and pauses.
    """

    def __init__(self, service: str, stop: StopEvent) -> None:
        self._service = service
        self._stop = stop

    def start(self, method: Any, request: Any) -> PendingCall:
        """Start a call without waiting for its response."""
        return PendingCall(method, request, method.future(request, timeout=RESTART_TIMEOUT_S, wait_for_ready=True))

    def result(self, call: PendingCall) -> Any:
        """Return the response of a call, which is repeated while the service is temporarily unable to answer.

        Raises:
            grpc.RpcError: the call failed permanently, or for longer than it is retried.
            Stopped: the stop event was set.
        """
        started_s = time.monotonic()
        is_logged = False
        while True:
            try:
                return call.future.result(timeout=POLL_INTERVAL_S)
            except grpc.FutureTimeoutError:
                if self._stop.is_set():
                    call.cancel()
                    raise cancellation.Stopped from None
            except grpc.RpcError as error:
                if time.monotonic() - started_s >= _retry_timeout_s(error):
                    raise
                if not is_logged:
                    _log.warning("waiting for %s: %s", self._service, error.details())
                    is_logged = True
                self.pause(_RETRY_INTERVAL_S)
                call.future = self.start(call.method, call.request).future

    def pause(self, pause_s: float) -> None:
        """Wait for some seconds.

        Raises:
            Stopped: the stop event was set.
        """
        self._stop.wait(pause_s)
        cancellation.check(self._stop)


def _retry_timeout_s(error: grpc.RpcError) -> float:
    """Return how long a call that failed with this error is retried; 0 for permanent errors."""
    timeouts_s = {
        grpc.StatusCode.RESOURCE_EXHAUSTED: DISK_FULL_TIMEOUT_S,
        grpc.StatusCode.UNAVAILABLE: RESTART_TIMEOUT_S,
    }
    return timeouts_s.get(rpc.status_code(error), 0.0)
