"""`deskrl up`: a whole run on this machine, from an empty folder to a judged one, readable top to bottom.

Knows the order of things and the roles by name; the work is the roles' own. A run that was cut short is resumed by the
same command; one that was finished is kept under a dated name and begun anew.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from deskrl.core import devices
from deskrl.core.config import ModelConfig, RunConfig, dump_config, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent, die_with_parent, stop_event
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.core.running import preflight
from deskrl.core.running.acceptance import Criterion, RunFacts, expected_of, judge
from deskrl.core.running.begun import has_learnt, read_state, refuse_other_config
from deskrl.core.running.live import LiveDisplay, clock
from deskrl.core.running.progress import ProgressMeter
from deskrl.core.running.starting import (
    INFERENCE_START_S,
    at_home,
    needs_model,
    replay_stub,
    start_actors,
    start_replay,
    start_replica,
    start_replicas,
    tell_failure,
    wait_healthy,
)
from deskrl.core.running.supervisor import RoleFailed, Supervisor
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc

_POLL_S = 0.5
_MEMORY_EVERY = 10
_MODEL_BUILD_S = 300.0
_PROOF_S = 300.0
_STOP_S = 60.0
_VERDICTS = {True: "[green]yes", False: "[red]no", None: "[dim]-"}


class Interrupted(RuntimeError):
    """A person or a scheduler asked the run to stop."""


def up(config: RunConfig) -> int:
    """Run everything; returns an exit status.

    0: every criterion that was judged is met; 1: one is not; 130: it was stopped; 2: an input was refused.
    """
    folder = RunFolder(config.folder)
    try:
        return _up(config, folder)
    except RoleFailed as error:
        return tell_failure(error, folder)


def _up(config: RunConfig, folder: RunFolder) -> int:
    stop = stop_event()
    die_with_parent(_STOP_S)  # a sweep, if one started this
    console = Console()
    num_leftovers = _end_leftovers(folder)
    preflight.refuse_bad_run(config)
    started_unix_s = _open_folder(config, folder, console)
    supervisor = Supervisor(folder)
    if not has_learnt(folder):  # nobody else is at it by now
        shutil.rmtree(folder.root / "model", ignore_errors=True)
        dump_config(config, folder.config)
    if num_leftovers:
        console.print(f"removed {num_leftovers} leftovers of the run that was killed", highlight=False)
    try:
        proof = _run(config, folder, supervisor, stop, console, started_unix_s)
    except Interrupted:
        if supervisor.is_saving():
            console.print("a checkpoint is being written: the run ends with it", highlight=False)
        supervisor.close()
        console.print(f"stopped; the same command resumes {folder.root}", highlight=False)
        return 130
    except BaseException:
        supervisor.close()
        raise
    facts = RunFacts(supervisor.num_restarts(), supervisor.close(), proof)
    return _conclude(config, folder, facts, console, started_unix_s)


def _end_leftovers(folder: RunFolder) -> int:
    """End what a killed supervisor left, which may still hold the run's ports; returns how much it was.

    Raises:
        UserError: the run is supervised by a living process.
    """
    if not folder.lock.exists():  # nobody has ever supervised it
        return 0
    supervisor = Supervisor(folder)
    supervisor.close()
    return supervisor.num_leftovers


def report(root: Path) -> int:
    """Write report.html of a run, finished or cut short, with a replay service of its own.

    Wherever the roles ran, and whatever certificates they had, this one is found on this machine's loopback alone.
    """
    folder = RunFolder(root.absolute())
    config = at_home(read_resolved(folder.config), folder)
    preflight.refuse_ports(config)
    supervisor = Supervisor(folder)
    try:
        print(_write_report(config, folder, supervisor))
    except RoleFailed as error:
        return tell_failure(error, folder)
    finally:
        supervisor.close()
    return 0


def _run(
    config: RunConfig,
    folder: RunFolder,
    supervisor: Supervisor,
    stop: StopEvent,
    console: Console,
    started_unix_s: float,
) -> dict[str, Any] | None:
    """Start the roles, watch them until the learner is done, stop them, prove the checkpoint if that is asked for."""
    resolved = str(folder.config)
    importlib.import_module("deskrl.actor.prepare").main(config)
    start_replay(config, folder.config, supervisor)
    start_actors(config, folder.config, supervisor)
    if needs_model(config):
        supervisor.run_to_end("model", "model", resolved, timeout_s=_MODEL_BUILD_S)
    start_replicas(config, folder.config, supervisor)
    gpus = devices.visible(config.learner.devices, os.environ)
    supervisor.start("learner", "learner", resolved, environment=gpus)
    _watch_until_done(config, folder, supervisor, stop, console, started_unix_s)
    console.print("learnt", highlight=False)
    supervisor.stop([name for name in supervisor.children if name != "replay"])
    if not config.learner.prove_checkpoint:
        return None
    console.print("proving the checkpoint", highlight=False)
    return _prove_checkpoint(config, folder, supervisor)


def _watch_until_done(
    config: RunConfig,
    folder: RunFolder,
    supervisor: Supervisor,
    stop: StopEvent,
    console: Console,
    started_unix_s: float,
) -> None:
    meter = ProgressMeter(config, started_unix_s)
    peak_bytes = 0
    with (
        LiveDisplay(console, config.name, config.learner.grpo.num_updates, config.learner.grpo.env_steps) as display,
        replay_stub(config) as stub,
    ):
        for turn in range(2**62):
            supervisor.watch(finite=["learner"])
            if turn % _MEMORY_EVERY == 0:
                peak_bytes = max(peak_bytes, supervisor.memory_bytes())
                preflight.refuse_full_disk(folder)
            display.show(meter.read(list(folder.read_metrics()), _replay_status(stub)))
            if supervisor.children["learner"].done:
                break
            if stop.wait(_POLL_S):
                raise Interrupted
    folder.append_metrics("memory", peak_bytes=peak_bytes)


def _prove_checkpoint(config: RunConfig, folder: RunFolder, supervisor: Supervisor) -> dict[str, Any]:
    """Serve the newest checkpoint from a fresh engine and compare it with transformers."""
    newest = (folder.checkpoints / "latest").resolve()
    served = folder.results / "checkpoint_proof_config.json"
    dump_config(config.model_copy(update={"model": ModelConfig(path=newest)}), served)
    outcome = folder.results / "checkpoint_proof.json"
    try:
        start_replica(config, served, supervisor, 0, "proof-inference")
        wait_healthy(config.inference.address, supervisor, "proof-inference", INFERENCE_START_S)
        gpus = devices.visible(config.learner.devices, os.environ)
        command = ("prove-checkpoint", str(served), str(outcome))
        supervisor.run_to_end("proof", *command, timeout_s=_PROOF_S, environment=gpus)
    except RoleFailed as error:
        return {"error": str(error)}
    finally:
        supervisor.stop(["proof-inference", "proof"])
    proof: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    return proof


def _conclude(config: RunConfig, folder: RunFolder, facts: RunFacts, console: Console, started_unix_s: float) -> int:
    criteria = judge(list(folder.read_metrics()), facts, expected_of(config))
    write_json(folder.results / "acceptance.json", [asdict(criterion) for criterion in criteria])
    supervisor = Supervisor(folder)
    try:
        path = _write_report(config, folder, supervisor)
    finally:
        supervisor.close()
    write_json(folder.supervisor, {"state": "finished", "started_unix_s": started_unix_s})
    console.print(_table(config.name, criteria))
    peak = max((line["peak_bytes"] for line in folder.read_metrics("memory")), default=0)
    elapsed = clock(time.time() - started_unix_s)
    console.print(f"{elapsed} from start to table, peak memory {peak / 1024**3:.1f} GiB", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return 1 if any(criterion.ok is False for criterion in criteria) else 0


def _table(name: str, criteria: Sequence[Criterion]) -> Table:
    table = Table(title=f"deskrl {name}", title_justify="left")
    for column in ("", "criterion", "value", "how it is known"):
        table.add_column(column, overflow="fold")
    for row in criteria:
        table.add_row(_VERDICTS[row.ok], row.criterion, row.value, f"[dim]{row.how}")
    return table


def _write_report(config: RunConfig, folder: RunFolder, supervisor: Supervisor) -> Path:
    from deskrl.core.report import write_report

    local = folder.results / "report_config.json"
    dump_config(config, local)
    start_replay(config, local, supervisor)
    path = write_report(folder, config, config.replay.address)
    supervisor.stop(["replay"])
    return path


def _open_folder(config: RunConfig, folder: RunFolder, console: Console) -> float:
    """Begin, resume, or set aside what was finished; returns when the run began (Unix seconds)."""
    state = read_state(folder)
    if state.get("state") == "finished":
        aside = folder.root.with_name(time.strftime(f"{folder.root.name}-%Y%m%d-%H%M%S"))
        folder.root.rename(aside)
        console.print(f"the finished run is kept as {aside}", highlight=False, soft_wrap=True)
        state = {}
    if state and has_learnt(folder):
        refuse_other_config(config, folder)
        console.print(f"resuming {folder.root}", highlight=False, soft_wrap=True)
        return float(state["started_unix_s"])
    _create(folder)
    started_unix_s = time.time()
    write_json(folder.supervisor, {"state": "running", "started_unix_s": started_unix_s})
    return started_unix_s


def _create(folder: RunFolder) -> None:
    try:
        folder.create()
    except OSError as error:
        raise UserError(f"{folder.root}: no run can be kept here ({error.strerror})", "choose other --runs") from error


def _replay_status(stub: replay_pb2_grpc.ReplayServiceStub) -> replay_pb2.GetReplayStatusResponse | None:
    try:
        status: replay_pb2.GetReplayStatusResponse = stub.GetReplayStatus(
            replay_pb2.GetReplayStatusRequest(), timeout=2
        )
    except grpc.RpcError:
        return None
    return status
