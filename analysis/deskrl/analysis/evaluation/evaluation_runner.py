"""`deskrl eval`: runs task lists with the policy of a checkpoint or an external server, without a learner.

No weights are published, so one policy version acts in the whole evaluation; an episode in which another version acted
does not count. Finished episodes are durable: repeating the command resumes an interrupted evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from deskrl.actor.agent import external_server
from deskrl.analysis.evaluation.episode_records import collect_tasks
from deskrl.analysis.evaluation.summary import summarise
from deskrl.analysis.evaluation.summary_table import print_summary
from deskrl.analysis.evaluation.task_sets import TaskSet
from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dotted, dump_config, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.process_lifecycle import StopEvent, stop_event
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import read_identity
from deskrl.launch import preflight
from deskrl.launch.port_assignment import PortReservation, assign_ports
from deskrl.launch.role_launch import (
    INFERENCE_START_S,
    replay_stub,
    report_role_failure,
    start_actors,
    start_replay,
    start_replicas,
    wait_healthy,
)
from deskrl.launch.run_state import influences_results
from deskrl.launch.supervisor import RoleFailed, Supervisor
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc, rollout_pb2

_POLL_S = 0.5
_CALL_S = 30.0
_LINEAGE = "eval"


@dataclass(frozen=True)
class SetEvaluation:
    """Evaluation of one task set, with its configuration."""

    task_set: TaskSet
    config: RunConfig

    @property
    def run_dir(self) -> RunDir:
        """Directory of its records and results."""
        return RunDir(self.config.run_dir)

    @property
    def summary_path(self) -> Path:
        """Path of its summary, which is written last."""
        return self.run_dir.results / "evaluation.json"


@dataclass(frozen=True)
class EvaluationPlan:
    """Number of episodes per task, and sampling temperature."""

    repeats: int
    temperature: float


def evaluation_config(config: RunConfig, checkpoint: Path | None, name: str) -> RunConfig:
    """Derive the configuration of an evaluation, with the same tasks, from that of a run.

    Args:
        config: run configuration.
        checkpoint: directory of the model; None if an external server acts.
        name: name of the evaluation, whose directory is below `runs`.
    """
    policy: dict[str, Any]
    if checkpoint is not None:
        policy = {
            "model": config.model.model_copy(update={"path": checkpoint.resolve(), "build": None}),
            # No weights are published.
            "inference": config.inference.model_copy(update={"weight_transfer": "auto"}),
        }
    else:
        # No replica is started, so keys of their GPUs do not apply.
        no_replicas = {"num_replicas": 0, "devices": (), "weight_transfer": "auto", "quantization": None}
        policy = {"inference": config.inference.model_copy(update=no_replicas)}
    return config.model_copy(
        update={
            "name": name,
            **policy,
            # There is no learner, so the replicas may use its GPUs.
            "learner": config.learner.model_copy(update={"warm_start": None, "devices": ()}),
        }
    )


def evaluate(
    config: RunConfig, sets: Sequence[TaskSet], plan: EvaluationPlan, set_keys: Collection[str] = frozenset()
) -> int:
    """Run the evaluation, or resume it, and print its summaries; a finished one is only printed.

    Args:
        config: configuration of the evaluation.
        sets: task sets, at least one.
        plan: number of episodes and sampling temperature.
        set_keys: keys that the user has set; ports that are not among them are chosen here.

    Returns:
        The exit status: 0 if it is finished, 130 if it was stopped, 1 or 2 if a role failed permanently.

    Raises:
        UserError: invalid input, or the directory contains another evaluation.
    """
    run_dir = RunDir(config.run_dir)
    parts = _set_evaluations(config, sets)
    _check_same_evaluation(config, parts, plan, run_dir)
    if not all(part.summary_path.exists() for part in parts):
        with PortReservation() as reservation:
            recorded = read_resolved(run_dir.config) if run_dir.config.exists() else None
            if "inference.openai_port" not in set_keys:  # it is that of the run whose configuration this is
                config = config.model_copy(update={"inference": config.inference.model_copy(update={"openai_port": 0})})
            # There is no learner, and so no port of its metrics.
            config = assign_ports(config, {*set_keys, "learner.metrics_port"}, reservation, recorded)
            status = _evaluate(config, _set_evaluations(config, sets), plan, run_dir)
        if status != 0:
            return status
    for part in parts:
        print_summary(json.loads(part.summary_path.read_text(encoding="utf-8")), part.run_dir)
    return 0


def _set_evaluations(config: RunConfig, sets: Sequence[TaskSet]) -> list[SetEvaluation]:
    return [SetEvaluation(one, one.apply_to(config, is_only=len(sets) == 1)) for one in sets]


def _evaluate(config: RunConfig, parts: Sequence[SetEvaluation], plan: EvaluationPlan, run_dir: RunDir) -> int:
    """Run all episodes that are not finished; returns the exit status."""
    stop = stop_event()
    rpc.load_own_identity("operator", config.security.certificates_dir)
    _open_dir(config, parts, plan, run_dir)
    rpc.set_run(read_identity(run_dir, config.name))
    supervisor = Supervisor(run_dir)
    try:
        is_finished = _run_episodes(config, parts, plan, run_dir, supervisor, stop)
    except RoleFailed as error:
        return report_role_failure(error, run_dir)
    finally:
        supervisor.close()
    if not is_finished:
        print(f"stopped; repeat the command to resume {run_dir.root}")
        return 130
    return 0


def _manifest(run_dir: RunDir) -> Path:
    return run_dir.root / "evaluation.json"


def _describe_request(config: RunConfig, parts: Sequence[SetEvaluation], plan: EvaluationPlan) -> dict[str, Any]:
    """Return the content of the manifest, which describes an evaluation completely."""
    sets = {part.task_set.name: json.loads(part.config.tasks.model_dump_json()) for part in parts}
    return {"plan": vars(plan), "config": json.loads(config.model_dump_json()), "sets": sets}


def _check_same_evaluation(
    config: RunConfig, parts: Sequence[SetEvaluation], plan: EvaluationPlan, run_dir: RunDir
) -> None:
    """Check that the directory is new or contains this evaluation, possibly with other ports; raises UserError."""
    manifest = _manifest(run_dir)
    if not manifest.exists():
        if run_dir.config.exists():
            raise UserError(f"{run_dir.root}: is a run directory", "choose another --name")
        return
    requested = dict(dotted(_describe_request(config, parts, plan)))
    recorded = dict(dotted(json.loads(manifest.read_text(encoding="utf-8"))))
    keys = [*requested, *(key for key in recorded if key not in requested)]
    changed = [key.removeprefix("config.") for key in keys if requested.get(key) != recorded.get(key)]
    changed = [key for key in changed if influences_results(key)]
    if changed:
        names = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
        raise UserError(
            f"{run_dir.root}: contains another evaluation, with other values of {names}",
            "choose another --name, or remove the directory",
        )


def _open_dir(config: RunConfig, parts: Sequence[SetEvaluation], plan: EvaluationPlan, run_dir: RunDir) -> None:
    """Create the directories of a new evaluation, and write its configuration with the ports of this start."""
    manifest = _manifest(run_dir)
    if not manifest.exists():
        for part in parts:
            preflight.check_tasks(part.config)  # before anything is written
        if config.inference.external_url is not None:
            external_server.check_reachable(config.inference)
    try:
        run_dir.create()
        for part in parts:
            part.run_dir.create()
            part.run_dir.id.write_bytes(run_dir.id.read_bytes())  # all sets have the servers of the evaluation
    except OSError as error:
        reason = f"{run_dir.root}: not writable: {error.strerror}"
        raise UserError(reason, "choose another directory with --runs") from error
    if not manifest.exists():
        write_json(manifest, _describe_request(config, parts, plan))
    dump_config(config, run_dir.config)
    for part in parts:
        dump_config(part.config, part.run_dir.config)


def _run_episodes(
    config: RunConfig,
    parts: Sequence[SetEvaluation],
    plan: EvaluationPlan,
    run_dir: RunDir,
    supervisor: Supervisor,
    stop: StopEvent,
) -> bool:
    """Start the roles and run all episodes; returns whether all results are written, False if it was stopped."""
    for part in parts:
        from deskrl.actor import materialize_tasks

        materialize_tasks.main(part.config)
    start_replay(config, run_dir.config, supervisor)
    replicas = start_replicas(config, run_dir.config, supervisor)
    for address, name in zip(config.inference.replica_addresses, replicas, strict=True):
        wait_healthy(address, supervisor, name, INFERENCE_START_S)
    version = evaluated_version(config)
    start_actors(config, run_dir.config, supervisor)
    with replay_stub(config) as stub:
        num_planned = 0
        for part in parts:
            tasks = part.run_dir.read_tasks()
            groups = plan_groups(part.config, plan, tasks, part.task_set.queue)
            num_planned += sum(len(group.seeds) for group in groups)
            for some in rpc.split_by_size(groups):
                request = replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", _LINEAGE), groups=some)
                stub.PlanGroups(request, timeout=_CALL_S, wait_for_ready=True)
        if not _wait_for_episodes(stub, num_planned, supervisor, stop):
            return False
        supervisor.stop([name for name in supervisor.children if name != "replay"])
        for part in parts:
            _write_results(stub, part, version)
    return True


def evaluated_version(config: RunConfig) -> str | None:
    """Return the policy version that the replicas serve, as lineage/step; None if an external server acts."""
    request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", _LINEAGE))
    versions = set()
    for address in config.inference.replica_addresses:
        with rpc.connect_sync(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            version = stub.GetModelInfo(request, timeout=_CALL_S).version
        versions.add(f"{version.lineage}/{version.step}")
    if len(versions) > 1:
        listed = ", ".join(sorted(versions))
        raise UserError(
            f"the replicas serve different policy versions: {listed}", "possibly stop another publisher of weights"
        )
    return versions.pop() if versions else None


def _write_results(stub: replay_pb2_grpc.ReplayServiceStub, part: SetEvaluation, version: str | None) -> None:
    """Write the episodes of a task set, then its summary.

    Raises:
        UserError: an episode is damaged on the disk of the replay service.
    """
    config, run_dir = part.config, part.run_dir
    try:
        tasks = collect_tasks(stub, run_dir, part.task_set.queue, version)
    except grpc.RpcError as error:
        if rpc.status_code(error) not in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND):
            raise
        hint = "repeat the command, which plays the damaged episodes again"
        raise UserError(f"{run_dir.root}: {error.details()}", hint) from error
    summary = summarise(tasks, config.replay.success_threshold)
    left_out = run_dir.left_out
    summary["left_out"] = json.loads(left_out.read_text(encoding="utf-8")) if left_out.exists() else {}
    if config.inference.external_url is not None:
        summary["external"] = external_server.describe_policy(config.inference)
    write_json(part.summary_path, summary)


def plan_groups(
    config: RunConfig, plan: EvaluationPlan, tasks: dict[str, Any], queue: str
) -> list[replay_pb2.GroupPlan]:
    """Return one group per task, with one member per repeat; deterministic for a configuration.

    A task has the same seeds in every task set, so that its plain and its noisy variant differ only in the noise.
    """
    return [
        replay_pb2.GroupPlan(
            group_id=f"{queue}/{task_id}",
            queue=queue,
            task_id=task_id,
            task_json=json.dumps(task).encode(),
            seeds=[ids.derive_seed(config.seed, _LINEAGE, task_id, number) for number in range(plan.repeats)],
            max_steps=config.tasks.max_steps,
            temperature=plan.temperature,
            acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        )
        for task_id, task in tasks.items()
    ]


def _wait_for_episodes(
    stub: replay_pb2_grpc.ReplayServiceStub, num_planned: int, supervisor: Supervisor, stop: StopEvent
) -> bool:
    """Wait until every episode has ended, printing progress; returns False if a stop is requested first."""
    started_s, last_num_ended = time.monotonic(), -1
    while not stop.wait(_POLL_S):
        supervisor.watch()
        status = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=_CALL_S, wait_for_ready=True)
        num_faulted = sum(queue.num_faulted for queue in status.queues)
        num_ended = num_faulted + sum(queue.num_finished for queue in status.queues)
        if num_ended != last_num_ended:
            elapsed_s = time.monotonic() - started_s
            num_succeeded = sum(queue.num_succeeded for queue in status.queues)
            progress = f"{num_ended} of {num_planned} episodes, {num_succeeded} successes, {num_faulted} faults"
            print(f"{elapsed_s:6.0f} s  {progress}", flush=True)
            last_num_ended = num_ended
        if num_ended >= num_planned:
            return True
    return False
