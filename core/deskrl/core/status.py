"""`deskrl status RUN`: asks every role of a run how it is. Knows the contracts and which roles a run has.

Services answer for themselves; actors and the learner serve nothing, so replay tells when it last heard of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from deskrl.core import rpc
from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.report.page import counts_in_words, span_text
from deskrl.core.runfolder import RunFolder
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc

_TIMEOUT_S = 5.0
_LEARNER_SILENCE_S = 120.0
"""A learner that learns says nothing meanwhile; after this long nobody can tell whether it still does."""
_MOST_ACTOR_ROWS = 8

ReplayStatus = replay_pb2.GetReplayStatusResponse


@dataclass(frozen=True)
class RoleStatus:
    """One role's line."""

    role: str
    is_well: bool | None
    """None: it cannot be told from here."""
    detail: str
    version: str = ""
    address: str = ""
    uptime_s: float | None = None


def status(root: Path) -> int:
    """Print how each role of a run is; returns 0 if all are well or the run has finished, else 1.

    Raises:
        UserError: there is no run in `root`.
    """
    folder = RunFolder(root.absolute())
    config = read_resolved(folder.config)
    rpc.identify_as("operator", config.security.folder)
    console = Console()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(_ask_replica, index, config) for index in range(config.inference.num_replicas)]
        replay, counted = _ask_replay(config)
        rows = [
            replay,
            *(one.result() for one in asked),
            learner_status(folder, counted),
            *actors_status(config, counted),
        ]
    if phase_of(folder) == "finished" and not any(row.is_well for row in rows):
        console.print(f"{folder.root} has finished, and none of its roles runs", highlight=False, soft_wrap=True)
        return 0
    console.print(_table(config.name, rows))
    if counted is not None and counted.faults:
        faults = ", ".join(f"{name} {num}" for name, num in counts_in_words(counted.faults, "FAULT_KIND_"))
        console.print(f"faults over the run, each granted again: {faults}", highlight=False, soft_wrap=True)
    return 0 if all(row.is_well is not False for row in rows) else 1


def phase_of(folder: RunFolder) -> str:
    """The phase that the learner noted last; empty before the first."""
    phases = [line["phase"] for line in folder.read_metrics("phase")]
    return phases[-1] if phases else ""


def learner_status(folder: RunFolder, counted: ReplayStatus | None) -> RoleStatus:
    """The learner, by what replay heard of its first rank and by what it wrote down."""
    updates = list(folder.read_metrics("update"))
    doing = f"phase {phase_of(folder) or 'not begun'}" + (f", update {updates[-1]['update']}" if updates else "")
    if counted is None:
        return RoleStatus("learner", None, f"{doing}; replay would know more")
    ranks = [it for it in counted.peers if it.peer.role == "learner" and it.peer.name == "rank-0"]
    if not ranks:
        return RoleStatus("learner", False, f"{doing}; replay has not heard of it: deskrl learner CONFIG starts it")
    silent_s = ranks[0].silent_s
    heard = f"heard of {span_text(silent_s)} ago"
    is_well = True if silent_s < _LEARNER_SILENCE_S else None
    detail = f"{doing}, {heard}" + ("" if is_well else ": it learns, or is gone; its log tells")
    return RoleStatus("learner", is_well, detail, ranks[0].peer.version, uptime_s=ranks[0].known_for_s)


def actors_status(config: RunConfig, counted: ReplayStatus | None) -> list[RoleStatus]:
    """A line for each actor that there should be or is; of many, one for all that are well."""
    num_expected = config.num_actors
    if counted is None:
        return [RoleStatus(f"{num_expected} actors", None, "replay would know")]
    heard = {it.peer.name.partition(".")[0]: it for it in sorted(counted.peers, key=lambda it: -it.silent_s)}
    names = list(dict.fromkeys([*(f"actor-{index}" for index in range(num_expected)), *sorted(heard)]))
    rows = [_actor_status(name, heard.get(name), config) for name in names if name.startswith("actor-")]
    if len(rows) <= _MOST_ACTOR_ROWS:
        return rows
    well, others = [row for row in rows if row.is_well], [row for row in rows if not row.is_well]
    summary = RoleStatus(f"{len(well)} actors", True, f"heard of within {config.replay.lease_ttl_s:g} s")
    hidden = len(others) - _MOST_ACTOR_ROWS
    rest = [RoleStatus(f"{hidden} more", False, "not heard of")] if hidden > 0 else []
    return [*([summary] if well else []), *others[:_MOST_ACTOR_ROWS], *rest]


def _actor_status(name: str, heard: replay_pb2.PeerStatus | None, config: RunConfig) -> RoleStatus:
    if heard is None:
        start = f"deskrl actor CONFIG --index {name.removeprefix('actor-')}"
        return RoleStatus(name, False, f"replay has not heard of it: {start} starts it")
    is_well = heard.silent_s < config.replay.lease_ttl_s
    detail = f"heard of {span_text(heard.silent_s)} ago" + ("" if is_well else ": killed, stopped or cut off")
    return RoleStatus(name, is_well, detail, heard.peer.version, uptime_s=heard.known_for_s)


def _ask_replay(config: RunConfig) -> tuple[RoleStatus, ReplayStatus | None]:
    address = config.replay.address
    trouble = _trouble(address, "deskrl replay CONFIG")
    if trouble:
        return RoleStatus("replay", False, trouble, address=address), None
    with rpc.connect_sync(address) as channel:
        stub = replay_pb2_grpc.ReplayServiceStub(channel)
        try:
            reply: ReplayStatus = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return RoleStatus("replay", False, f"{error.code().name}: {error.details()}", address=address), None
    num_finished = sum(queue.num_finished for queue in reply.queues)
    num_leased = sum(queue.num_leased for queue in reply.queues)
    detail = f"{num_finished} episodes, {num_leased} running, {reply.database_bytes / 1024**2:.0f} MiB"
    return RoleStatus("replay", True, detail, reply.service.version, address, reply.service.uptime_s), reply


def _ask_replica(index: int, config: RunConfig) -> RoleStatus:
    name, address = f"inference-{index}", config.inference.replica_address(index)
    trouble = _trouble(address, f"deskrl inference CONFIG --index {index}")
    if trouble:
        return RoleStatus(name, False, trouble, address=address)
    with rpc.connect_sync(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", "status"))
        try:
            reply = stub.GetModelInfo(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return RoleStatus(name, False, f"{error.code().name}: {error.details()}", address=address)
    detail = f"policy version {reply.version.step}, {reply.engine}"
    return RoleStatus(name, True, detail, reply.service.version, address, reply.service.uptime_s)


def _trouble(address: str, start: str) -> str:
    """Why a service is not well; empty if it is."""
    try:
        return "" if rpc.check_health(address) else f"does not answer: {start} starts it"
    except UserError as error:
        return str(error)


def _table(name: str, rows: list[RoleStatus]) -> Table:
    table = Table(title=f"deskrl {name}", title_justify="left")
    for column in ("role", "", "version", "address", "up for", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column in ("role", "address"))
    marks = {True: "[green]well", False: "[red]not well", None: "[yellow]unknown"}
    for row in rows:
        uptime = "" if row.uptime_s is None else span_text(row.uptime_s)
        table.add_row(row.role, marks[row.is_well], row.version, row.address, uptime, row.detail)
    return table
