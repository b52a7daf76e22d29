"""`deskrl status RUN`: health of every role of a run.

Replay and the inference replicas are asked directly. Actors and the learner serve no RPC; replay reports when they last
called it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from rich.table import Table

from deskrl.analysis.evaluation.task_sets import task_set_dirs
from deskrl.analysis.formatting import format_duration, sorted_counts
from deskrl.analysis.run_config import read_run_config
from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.console import table_console
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import read_identity
from deskrl.launch.run_control import find_holder
from deskrl.launch.run_state import is_evaluation
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc

_TIMEOUT_S = 5.0
_LEARNER_SILENCE_S = 120.0
"""Time without a call after which the learner's health is unknown; it makes no calls during an update."""
_MAX_ACTOR_ROWS = 8
_MAX_TASKS = 8

ReplayStatus = replay_pb2.GetReplayStatusResponse


@dataclass(frozen=True)
class RoleStatus:
    """One row of the table."""

    role: str
    is_healthy: bool | None
    """None: unknown."""
    detail: str
    version: str = ""
    address: str = ""
    uptime_s: float | None = None
    start: str = ""
    """Command that starts the role, if it is not running."""


def status(root: Path) -> int:
    """Print the health of each role; returns 0 if all are healthy or the run has finished, else 1.

    A server at an address of this run that belongs to another run is not healthy.

    Args:
        root: run directory.

    Raises:
        UserError: `root` contains no run.
    """
    run_dir = RunDir(root.absolute())
    config = read_run_config(run_dir)
    rpc.load_own_identity("operator", config.security.certificates_dir)
    rpc.set_run(read_identity(run_dir, config.name))
    console = table_console()
    with ThreadPoolExecutor() as pool:
        replicas = [pool.submit(_ask_replica, index, config) for index in range(config.inference.num_replicas)]
        replay, replay_status = _ask_replay(config)
        rows = [
            replay,
            *(replica.result() for replica in replicas),
            *([] if is_evaluation(run_dir) else [learner_status(run_dir, replay_status)]),
            *actor_statuses(config, replay_status),
        ]
    if _is_finished(run_dir) and not any(row.is_healthy for row in rows):
        console.print(f"{run_dir.root} has finished; none of its roles is running", highlight=False, soft_wrap=True)
        return 0
    console.print(_table(config.name, [_with_start(row, find_holder(run_dir) is not None) for row in rows]))
    if replay_status is not None and replay_status.faults:
        faults = ", ".join(f"{name} {num}" for name, num in sorted_counts(replay_status.faults, "FAULT_KIND_"))
        console.print(f"faults so far, whose rollouts were granted again: {faults}", highlight=False, soft_wrap=True)
    if replay_status is not None and replay_status.lost_connections:
        console.print(lost_connections_text(replay_status), highlight=False, soft_wrap=True)
    return 0 if all(row.is_healthy is not False for row in rows) else 1


def _with_start(row: RoleStatus, is_supervised: bool) -> RoleStatus:
    """Return a row whose detail says how the role is started, if it is not running."""
    if not row.start:
        return row
    how = f"start it with: {row.start}"
    if is_supervised:
        how = "its supervisor starts it, see `logs` in the run directory"
    return replace(row, detail=f"{row.detail}; {how}")


def lost_connections_text(replay_status: ReplayStatus) -> str:
    """Return the tasks whose episodes lost their connection after the policy's first action, most affected first."""
    tasks = sorted(
        replay_status.lost_connections, key=lambda it: (-it.num_lost / (it.num_lost + it.num_finished), it.task_id)
    )
    texts = [f"{it.task_id} {it.num_lost} of {it.num_lost + it.num_finished}" for it in tasks[:_MAX_TASKS]]
    hidden = f" and {len(tasks) - _MAX_TASKS} more tasks" if len(tasks) > _MAX_TASKS else ""
    return f"attempts that lost their desktop after the policy's first action: {', '.join(texts)}{hidden}"


def _is_finished(run_dir: RunDir) -> bool:
    """Return whether a run or an evaluation has finished."""
    if not is_evaluation(run_dir):
        return last_phase(run_dir) == "finished"
    parts = task_set_dirs(run_dir.root).values() or [run_dir.root]
    return all((RunDir(part).results / "evaluation.json").exists() for part in parts)


def last_phase(run_dir: RunDir) -> str:
    """Return the phase that the learner recorded last; empty before the first."""
    phases = [line["phase"] for line in run_dir.read_metrics("phase")]
    return phases[-1] if phases else ""


def learner_status(run_dir: RunDir, replay_status: ReplayStatus | None) -> RoleStatus:
    """Return the learner's status from its metrics and from the last call of its first rank to replay."""
    updates = list(run_dir.read_metrics("update"))
    doing = f"phase {last_phase(run_dir) or 'not started'}" + (f", update {updates[-1]['update']}" if updates else "")
    if replay_status is None:
        return RoleStatus("learner", None, f"{doing}; unknown without replay")
    ranks = [it for it in replay_status.peers if it.peer.role == "learner" and it.peer.name == "rank-0"]
    if not ranks:
        return RoleStatus("learner", False, f"{doing}; has not called replay", start="deskrl learner CONFIG")
    silent_s = ranks[0].silent_s
    last_call = f"last call {format_duration(silent_s)} ago"
    is_healthy = True if silent_s < _LEARNER_SILENCE_S else None
    detail = f"{doing}, {last_call}" + ("" if is_healthy else "; either in a long update or dead, see its log")
    return RoleStatus("learner", is_healthy, detail, ranks[0].peer.version, uptime_s=ranks[0].known_for_s)


def actor_statuses(config: RunConfig, replay_status: ReplayStatus | None) -> list[RoleStatus]:
    """Return a row for each actor that is configured or has called replay; many healthy actors share one row."""
    num_expected = config.num_actors
    if replay_status is None:
        return [RoleStatus(f"{num_expected} actors", None, "unknown without replay")]
    heard = {it.peer.name.partition(".")[0]: it for it in sorted(replay_status.peers, key=lambda it: -it.silent_s)}
    names = list(dict.fromkeys([*(f"actor-{index}" for index in range(num_expected)), *sorted(heard)]))
    rows = [_actor_status(name, heard.get(name), config) for name in names if name.startswith("actor-")]
    if len(rows) <= _MAX_ACTOR_ROWS:
        return rows
    healthy, others = [row for row in rows if row.is_healthy], [row for row in rows if not row.is_healthy]
    summary = RoleStatus(f"{len(healthy)} actors", True, f"last call within {config.replay.lease_ttl_s:g} s")
    hidden = len(others) - _MAX_ACTOR_ROWS
    rest = [RoleStatus(f"{hidden} more", False, "no recent call")] if hidden > 0 else []
    return [*([summary] if healthy else []), *others[:_MAX_ACTOR_ROWS], *rest]


def _actor_status(name: str, heard: replay_pb2.PeerStatus | None, config: RunConfig) -> RoleStatus:
    if heard is None:
        start = f"deskrl actor CONFIG --index {name.removeprefix('actor-')}"
        return RoleStatus(name, False, "has not called replay", start=start)
    is_healthy = heard.silent_s < config.replay.lease_ttl_s
    detail = f"last call {format_duration(heard.silent_s)} ago" + ("" if is_healthy else "; dead or disconnected")
    if num := heard.num_desktops_set_aside:
        is_healthy = False
        desktops = "1 desktop does not start and is" if num == 1 else f"{num} desktops do not start and are"
        detail += f"; {desktops} retried: {heard.start_error}"
    return RoleStatus(name, is_healthy, detail, heard.peer.version, uptime_s=heard.known_for_s)


def _ask_replay(config: RunConfig) -> tuple[RoleStatus, ReplayStatus | None]:
    address = config.replay.address
    if row := _not_serving("replay", address, "deskrl replay CONFIG"):
        return row, None
    with rpc.connect_sync(address) as channel:
        stub = replay_pb2_grpc.ReplayServiceStub(channel)
        try:
            reply: ReplayStatus = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return RoleStatus("replay", False, rpc.describe_error(error), address=address), None
    num_finished = sum(queue.num_finished for queue in reply.queues)
    num_leased = sum(queue.num_leased for queue in reply.queues)
    detail = f"{num_finished} episodes, {num_leased} running, {reply.database_bytes / 1024**2:.0f} MiB"
    return RoleStatus("replay", True, detail, reply.service.version, address, reply.service.uptime_s), reply


def _ask_replica(index: int, config: RunConfig) -> RoleStatus:
    name, address = f"inference-{index}", config.inference.replica_address(index)
    if row := _not_serving(name, address, f"deskrl inference CONFIG --index {index}"):
        return row
    with rpc.connect_sync(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", "status"))
        try:
            reply = stub.GetModelInfo(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return RoleStatus(name, False, rpc.describe_error(error), address=address)
    detail = f"policy version {reply.version.step}, {reply.engine}"
    return RoleStatus(name, True, detail, reply.service.version, address, reply.service.uptime_s)


def _not_serving(name: str, address: str, start: str) -> RoleStatus | None:
    """Return the status of a service that is not healthy; None if it is."""
    try:
        if rpc.check_health(address):
            return None
    except UserError as error:
        return RoleStatus(name, False, error.message, address=address)
    return RoleStatus(name, False, "not reachable", address=address, start=start)


def _table(name: str, rows: list[RoleStatus]) -> Table:
    table = Table(title=f"deskrl {name}", title_justify="left")
    for column in ("role", "health", "version", "address", "uptime", "activity"):
        table.add_column(column, overflow="fold", no_wrap=column in ("role", "address"))
    marks = {True: "[green]healthy", False: "[red]unhealthy", None: "[yellow]unknown"}
    for row in rows:
        uptime = "" if row.uptime_s is None else format_duration(row.uptime_s)
        table.add_row(row.role, marks[row.is_healthy], row.version, row.address, uptime, row.detail)
    return table
