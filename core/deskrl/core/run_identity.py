"""Identity of a run: sent with every gRPC call, so that a server rejects the processes of another run.

A run is known by the random id in its run directory and by its name. Machines without a common disk have directories of
their own, possibly with different ids, so that ids are compared on one machine only, and names otherwise.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from deskrl.core.run_dir import RunDir
from deskrl.core.security.authorization import guard_handler

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

OTHER_RUN = "this server belongs to another run"
"""Beginning of the details with which a server rejects a call of another run (FAILED_PRECONDITION)."""
_USER_AGENT = re.compile(r"deskrl-run/(?P<name>[^/ ]+)/(?P<id>[0-9a-f]*)/(?P<host>[^/ ]*)")


@dataclass(frozen=True)
class RunIdentity:
    """Run that a process belongs to."""

    name: str
    id: str = ""
    """Random id of the run directory; empty if it is unknown, as on a machine without the directory."""
    host: str = ""
    """Host name of the machine or container of the process."""
    root: Path | None = None
    """Run directory, for messages; not part of the user agent."""

    def to_user_agent(self) -> str:
        """Return the text that calls carry."""
        return f"deskrl-run/{self.name}/{self.id}/{self.host}"

    def is_same_run(self, other: RunIdentity) -> bool:
        """Return whether both processes belong to one run, as far as that is known."""
        if self.id and other.id and (self.id == other.id or self.host == other.host):
            return self.id == other.id
        return self.name == other.name

    def describe(self) -> str:
        """Return name and, if known, directory of the run."""
        return f"{self.name} ({self.root})" if self.root is not None else self.name


def read_identity(run_dir: RunDir, name: str) -> RunIdentity:
    """Return the identity of a run by its directory, which need not exist, and its name."""
    return RunIdentity(name, run_dir.read_id(), socket.gethostname(), run_dir.root)


def parse_user_agent(text: str) -> RunIdentity | None:
    """Return the run of a caller; None if its user agent names none, as that of a health probe."""
    found = _USER_AGENT.search(text)
    return None if found is None else RunIdentity(found["name"], found["id"], found["host"])


class RunInterceptor(grpc.aio.ServerInterceptor):
    """Server interceptor that rejects calls of processes of another run; callers that name no run are accepted.

    Args:
        run: run of the server.
    """

    def __init__(self, run: RunIdentity) -> None:
        self._run = run

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a method, or one that rejects the call."""
        handler = await continuation(handler_call_details)
        agent = next((value for key, value in handler_call_details.invocation_metadata if key == "user-agent"), "")
        caller = parse_user_agent(agent if isinstance(agent, str) else agent.decode(errors="replace"))
        if handler is None or caller is None or self._run.is_same_run(caller):
            return handler
        details = f"{OTHER_RUN}: {self._run.describe()}, not {caller.name}"
        return guard_handler(handler, lambda context: context.abort(grpc.StatusCode.FAILED_PRECONDITION, details))
