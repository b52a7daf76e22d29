"""`deskrl up`: runs all roles on this machine from an empty run directory to the acceptance table.

An interrupted run is resumed by the same command. A finished run is renamed with a time stamp, and a new one starts.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from deskrl.core import rpc
from deskrl.core.config import ModelConfig, RunConfig, dump_config, read_resolved
from deskrl.core.console import table_console
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.process_lifecycle import StopEvent, die_with_parent, stop_event
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import read_identity
from deskrl.launch import gpu_assignment, preflight
from deskrl.launch.acceptance import Criterion, RunFacts, expected_of, judge
from deskrl.launch.live_display import LiveDisplay, format_minutes
from deskrl.launch.port_assignment import PortReservation, assign_ports
from deskrl.launch.progress import ProgressMeter
from deskrl.launch.role_launch import (
    INFERENCE_START_S,
    needs_model,
    replay_stub,
    report_role_failure,
    start_actors,
    start_replay,
    start_replica,
    start_replicas,
    wait_healthy,
)
from deskrl.launch.run_state import (
    check_same_config,
    has_started_training,
    is_evaluation,
    is_finished,
    read_state,
)
from deskrl.launch.supervisor import RoleFailed, Supervisor
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc

_POLL_S = 0.5
_MEMORY_EVERY = 10
_MODEL_BUILD_S = 300.0
_PROOF_S = 300.0
_MERGE_S = 900.0
_STOP_S = 60.0
_VERDICTS = {True: "[green]met", False: "[red]not met", None: "[dim]not judged"}


class Interrupted(RuntimeError):
    """The run was asked to stop (SIGINT or SIGTERM)."""


WriteReport = Callable[[RunDir, RunConfig], Path]
"""Function that writes the report page of a run and returns its path."""


def up(config: RunConfig, write_report: WriteReport, set_keys: Collection[str] = ()) -> int:
    """Run all roles to the end of the run; returns the exit status.

    Args:
        config: run configuration.
        write_report: called once, after the run is judged.
        set_keys: keys that the user has set; ports that are not among them are chosen here.

    0: all judged criteria are met; 1: a criterion is not met or a role failed; 2: bad input; 130: stopped.
    """
    folder = RunDir(config.run_dir)
    try:
        with PortReservation() as reservation:
            return _up(config, folder, write_report, set_keys, reservation)
    except RoleFailed as error:
        return report_role_failure(error, folder)


def _up(
    config: RunConfig,
    folder: RunDir,
    write_report: WriteReport,
    set_keys: Collection[str],
    reservation: PortReservation,
) -> int:
    stop = stop_event()
    die_with_parent(_STOP_S)  # the parent may be a sweep
    console = table_console()
    if is_evaluation(folder):
        raise UserError(f"{folder.root}: is an evaluation", "choose another --name")
    num_leftovers = _end_leftovers(folder)
    is_resumed = has_started_training(folder) and not is_finished(folder)
    recorded = read_resolved(folder.config) if is_resumed else None
    config = assign_ports(config, set_keys, reservation, recorded)
    preflight.check_run(config)
    started_unix_s = _open_folder(config, folder, console)
    rpc.set_run(read_identity(folder, config.name))
    supervisor = Supervisor(folder)
    if not has_started_training(folder):  # the supervisor's lock is held by now
        shutil.rmtree(folder.root / "model", ignore_errors=True)
    dump_config(config, folder.config)  # a resumed run may have other ports
    if num_leftovers:
        console.print(f"removed {num_leftovers} leftovers of a killed run", highlight=False)
    try:
        proof = _run(config, folder, supervisor, stop, console, started_unix_s)
    except Interrupted:
        if supervisor.is_writing_checkpoint():
            console.print("stopping after the checkpoint that is being written", highlight=False)
        supervisor.close()
        console.print(f"stopped (hint: the same command resumes {folder.root})", highlight=False)
        return 130
    except BaseException:
        supervisor.close()
        raise
    facts = RunFacts(supervisor.num_restarts(), supervisor.close(), proof)
    return _conclude(config, folder, facts, console, started_unix_s, write_report)


def _end_leftovers(folder: RunDir) -> int:
    """Clean up after a killed supervisor, whose processes may still hold the run's ports; returns the number of items.

    Raises:
        UserError: another process supervises the run.
    """
    if not folder.lock.exists():  # the run was never supervised
        return 0
    supervisor = Supervisor(folder)
    supervisor.close()
    return supervisor.num_leftovers


def _run(
    config: RunConfig,
    folder: RunDir,
    supervisor: Supervisor,
    stop: StopEvent,
    console: Console,
    started_unix_s: float,
) -> dict[str, Any] | None:
    """Start the roles, watch them until the learner is done, stop them, and verify the checkpoint if configured."""
    resolved = str(folder.config)
    from deskrl.actor import materialize_tasks

    materialize_tasks.main(config)
    start_replay(config, folder.config, supervisor)
    start_actors(config, folder.config, supervisor)
    if needs_model(config):
        supervisor.run_to_end("build-model", "build-model", resolved, timeout_s=_MODEL_BUILD_S)
    start_replicas(config, folder.config, supervisor)
    gpus = gpu_assignment.visible(config.learner.devices, os.environ)
    supervisor.start("learner", "learner", resolved, environment=gpus)
    _watch_until_done(config, folder, supervisor, stop, console, started_unix_s)
    console.print("training finished", highlight=False)
    supervisor.stop([name for name in supervisor.children if name != "replay"])
    if not config.learner.verify_checkpoint:
        return None
    console.print("verifying the checkpoint", highlight=False)
    return _verify_checkpoint(config, folder, supervisor)


def _watch_until_done(
    config: RunConfig,
    folder: RunDir,
    supervisor: Supervisor,
    stop: StopEvent,
    console: Console,
    started_unix_s: float,
) -> None:
    meter = ProgressMeter(config, started_unix_s)
    peak_bytes = 0
    with (
        LiveDisplay(
            console, config.name, config.learner.grpo.num_updates, config.learner.grpo.max_env_steps
        ) as display,
        replay_stub(config) as stub,
    ):
        for turn in range(2**62):
            supervisor.watch(finite=["learner"])
            if turn % _MEMORY_EVERY == 0:
                peak_bytes = max(peak_bytes, supervisor.memory_bytes())
                preflight.check_disk_not_full(folder)
            display.show(meter.read(list(folder.read_metrics()), _replay_status(stub)))
            if supervisor.children["learner"].done:
                break
            if stop.wait(_POLL_S):
                raise Interrupted
    folder.append_metrics("memory", peak_bytes=peak_bytes)


def _verify_checkpoint(config: RunConfig, folder: RunDir, supervisor: Supervisor) -> dict[str, Any]:
    """Serve the newest checkpoint with a fresh engine and compare its logprobs with those of transformers.

    With LoRA, its adapter is merged into a copy of the model first, which is removed afterwards.
    """
    newest = (folder.checkpoints / "latest").resolve()
    model_folder = folder.root / "merged" if config.learner.has_lora else newest
    served = folder.results / "checkpoint_proof_config.json"
    model = ModelConfig(path=model_folder, architecture=config.model.architecture)
    dump_config(config.model_copy(update={"model": model}), served)
    outcome = folder.checkpoint_proof
    try:
        if config.learner.has_lora:
            shutil.rmtree(model_folder, ignore_errors=True)
            merged = [str(newest), str(model_folder), "--base", str(config.model_folder)]
            merged += ["--architecture", config.model.architecture] if config.model.architecture else []
            supervisor.run_to_end("merge-adapter", "merge-adapter", *merged, timeout_s=_MERGE_S)
        start_replica(config, served, supervisor, 0, "proof-inference")
        # Started beside the engine: it loads the checkpoint while the engine starts, and waits for the engine.
        gpus = gpu_assignment.visible(config.learner.devices, os.environ)
        supervisor.start("proof", "verify-checkpoint", str(served), str(outcome), environment=gpus)
        wait_healthy(config.inference.address, supervisor, "proof-inference", INFERENCE_START_S)
        supervisor.wait_to_end("proof", _PROOF_S)
    except RoleFailed as error:
        return {"error": str(error)}
    finally:
        supervisor.stop(["proof-inference", "proof"])
        if config.learner.has_lora:
            shutil.rmtree(model_folder, ignore_errors=True)
    proof: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    return proof


def _conclude(
    config: RunConfig,
    folder: RunDir,
    facts: RunFacts,
    console: Console,
    started_unix_s: float,
    write_report: WriteReport,
) -> int:
    criteria = judge(list(folder.read_metrics()), facts, expected_of(config))
    write_json(folder.acceptance, [asdict(criterion) for criterion in criteria])
    path = write_report(folder, config)
    write_json(folder.supervisor, {"state": "finished", "started_unix_s": started_unix_s})
    console.print(_table(config.name, criteria))
    peak = max((line["peak_bytes"] for line in folder.read_metrics("memory")), default=0)
    elapsed = format_minutes(time.time() - started_unix_s)
    console.print(f"{elapsed} from start to end, peak memory {peak / 1024**3:.1f} GiB", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return 1 if any(criterion.ok is False for criterion in criteria) else 0


def _table(name: str, criteria: Sequence[Criterion]) -> Table:
    table = Table(title=f"deskrl {name}", title_justify="left")
    for column in ("", "criterion", "value", "measured by"):
        table.add_column(column, overflow="fold")
    for row in criteria:
        table.add_row(_VERDICTS[row.ok], row.criterion, row.value, f"[dim]{row.how}")
    return table


def _open_folder(config: RunConfig, folder: RunDir, console: Console) -> float:
    """Create or resume the run directory, renaming a finished one; returns the start time of the run (Unix seconds)."""
    state = read_state(folder)
    if state.get("state") == "finished":
        aside = folder.root.with_name(time.strftime(f"{folder.root.name}-%Y%m%d-%H%M%S"))
        folder.root.rename(aside)
        console.print(f"the finished run was renamed to {aside}", highlight=False, soft_wrap=True)
        state = {}
    if state and has_started_training(folder):
        check_same_config(config, folder)
        console.print(f"resuming {folder.root}", highlight=False, soft_wrap=True)
        write_json(folder.supervisor, {"state": "running", "started_unix_s": state["started_unix_s"]})
        return float(state["started_unix_s"])
    _create(folder)
    started_unix_s = time.time()
    write_json(folder.supervisor, {"state": "running", "started_unix_s": started_unix_s})
    return started_unix_s


def _create(folder: RunDir) -> None:
    try:
        folder.create()
    except OSError as error:
        raise UserError(f"{folder.root}: cannot create the run directory: {error.strerror}", "set --runs") from error


def _replay_status(stub: replay_pb2_grpc.ReplayServiceStub) -> replay_pb2.GetReplayStatusResponse | None:
    try:
        status: replay_pb2.GetReplayStatusResponse = stub.GetReplayStatus(
            replay_pb2.GetReplayStatusRequest(), timeout=2
        )
    except grpc.RpcError:
        return None
    return status
