"""`deskrl eval`: a checkpoint's replicas, actors and a replay service play task lists, with no learner beside them.

In place of replicas, somebody's own server may act. Nothing publishes weights, so one version acts from the first token
to the last; an episode in which another one did all the same does not count. What was played survives an interruption:
the same command goes on. Knows the order of things; what is kept and told is its neighbours'.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.evaluation import external
from deskrl.core.evaluation.record import collect
from deskrl.core.evaluation.sets import TaskSet
from deskrl.core.evaluation.show import show
from deskrl.core.evaluation.summary import summarise
from deskrl.core.lifetime import StopEvent, stop_event
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.core.running import preflight
from deskrl.core.running.starting import (
    INFERENCE_START_S,
    replay_stub,
    start_actors,
    start_replay,
    start_replicas,
    tell_failure,
    wait_healthy,
)
from deskrl.core.running.supervisor import RoleFailed, Supervisor
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc, rollout_pb2

_POLL_S = 0.5
_CALL_S = 30.0
_LINEAGE = "eval"


@dataclass(frozen=True)
class Part:
    """One set of tasks, and the configuration with its folder."""

    tasks: TaskSet
    config: RunConfig

    @property
    def folder(self) -> RunFolder:
        """Where it is kept."""
        return RunFolder(self.config.folder)

    @property
    def told(self) -> Path:
        """Its summary, which is there once all of it is."""
        return self.folder.results / "evaluation.json"


@dataclass(frozen=True)
class Plan:
    """How often each task is played, and how."""

    repeats: int
    temperature: float


def configure(config: RunConfig, checkpoint: Path | None, name: str) -> RunConfig:
    """A run's configuration turned into an evaluation's, of the same tasks.

    Args:
        config: how desktops, agent and inference are set up.
        checkpoint: folder of the model; None: an external server has it.
        name: of the evaluation; its folder is one of `runs`.
    """
    unplayable = "skip" if config.tasks.unplayable == "refuse" else config.tasks.unplayable
    served: dict[str, Any]
    if checkpoint is not None:
        served = {
            "model": config.model.model_copy(update={"path": checkpoint.resolve(), "build": None}),
            # No weights come.
            "inference": config.inference.model_copy(update={"weight_transfer": "auto"}),
        }
    else:
        served = {"inference": config.inference.model_copy(update={"num_replicas": 0})}
    return config.model_copy(
        update={
            "name": name,
            **served,
            "tasks": config.tasks.model_copy(update={"unplayable": unplayable}),
            # Nothing learns, so its GPUs are free for whoever acts.
            "learner": config.learner.model_copy(update={"warm_start": None, "devices": ()}),
        }
    )


def evaluate(config: RunConfig, sets: Sequence[TaskSet], plan: Plan) -> int:
    """Play everything, or tell again what was played.

    Returns:
        The exit status: 0 when it is told, 130 if it was stopped, 1 or 2 if a role ended for good.

    Raises:
        UserError: bad input, or the folder holds an evaluation of something else.
    """
    parts = [Part(one, one.settle_in(config, alone=len(sets) == 1)) for one in sets]
    folder = RunFolder(config.folder)
    stop = stop_event()
    rpc.identify_as("operator", config.security.folder)
    _open_folder(config, parts, plan, folder)
    if not all(part.told.exists() for part in parts):
        supervisor = Supervisor(folder)
        try:
            is_whole = _play(config, parts, plan, folder, supervisor, stop)
        except RoleFailed as error:
            return tell_failure(error, folder)
        finally:
            supervisor.close()
        if not is_whole:
            print(f"stopped; the same command goes on with {folder.root}")
            return 130
    for part in parts:
        show(json.loads(part.told.read_text(encoding="utf-8")), part.folder)
    return 0


def _open_folder(config: RunConfig, parts: Sequence[Part], plan: Plan, folder: RunFolder) -> None:
    """Begin, or go on with what was begun alike."""
    begun = folder.root / "evaluation.json"
    if not begun.exists():
        for part in parts:
            preflight.refuse_unplayable(part.config)  # before anything is written
        if config.inference.external_url is not None:
            external.refuse_absent(config.inference)
    sets = {part.tasks.name: json.loads(part.config.tasks.model_dump_json()) for part in parts}
    now = {"plan": vars(plan), "config": json.loads(config.model_dump_json()), "sets": sets}
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != now:
        raise UserError(f"{folder.root} holds another evaluation", "choose another --name, or remove it")
    if not begun.exists() and folder.config.exists():
        raise UserError(f"{folder.root} is the folder of a run", "choose another --name")
    try:
        folder.create()
        for part in parts:
            part.folder.create()
    except OSError as error:
        raise UserError(f"{folder.root}: nothing can be kept here ({error.strerror})", "choose other --runs") from error
    write_json(begun, now)
    dump_config(config, folder.config)
    for part in parts:
        dump_config(part.config, part.folder.config)


def _play(
    config: RunConfig,
    parts: Sequence[Part],
    plan: Plan,
    folder: RunFolder,
    supervisor: Supervisor,
    stop: StopEvent,
) -> bool:
    """Whether all was played and kept; False if it was stopped."""
    for part in parts:
        importlib.import_module("deskrl.actor.prepare").main(part.config)
    start_replay(config, folder.config, supervisor)
    replicas = start_replicas(config, folder.config, supervisor)
    for address, name in zip(config.inference.replica_addresses, replicas, strict=True):
        wait_healthy(address, supervisor, name, INFERENCE_START_S)
    evaluated = served_version(config)
    start_actors(config, folder.config, supervisor)
    with replay_stub(config) as stub:
        num_planned = 0
        for part in parts:
            tasks = json.loads((part.folder.root / "tasks.json").read_text(encoding="utf-8"))
            groups = plan_groups(part.config, plan, tasks, part.tasks.queue)
            num_planned += sum(len(group.seeds) for group in groups)
            request = replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", _LINEAGE), groups=groups)
            stub.PlanGroups(request, timeout=_CALL_S, wait_for_ready=True)
        if not _watch(stub, num_planned, supervisor, stop):
            return False
        supervisor.stop([name for name in supervisor.children if name != "replay"])
        for part in parts:
            _keep(stub, part, evaluated)
    return True


def served_version(config: RunConfig) -> str | None:
    """The policy version that is evaluated, as lineage/step: the replicas'; None where somebody's own server acts."""
    request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", _LINEAGE))
    served = set()
    for address in config.inference.replica_addresses:
        with rpc.connect_sync(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            version = stub.GetModelInfo(request, timeout=_CALL_S).version
        served.add(f"{version.lineage}/{version.step}")
    if len(served) > 1:
        told = ", ".join(sorted(served))
        raise UserError(f"the replicas serve {told}: no one policy", "end what else sends them weights")
    return served.pop() if served else None


def _keep(stub: replay_pb2_grpc.ReplayServiceStub, part: Part, evaluated: str | None) -> None:
    """Write what came of a set; its summary last."""
    config, folder = part.config, part.folder
    summary = summarise(collect(stub, folder, part.tasks.queue, evaluated), config.replay.success_above)
    left_out = folder.root / "left_out.json"
    summary["left_out"] = json.loads(left_out.read_text(encoding="utf-8")) if left_out.exists() else {}
    if config.inference.external_url is not None:
        summary["external"] = external.told_of(config.inference)
    write_json(part.told, summary)


def plan_groups(config: RunConfig, plan: Plan, tasks: dict[str, Any], queue: str) -> list[replay_pb2.GroupPlan]:
    """One group a task, whose members are its repeats; the same for the same configuration.

    A task has the same seeds in every set, so that its plain and its noisy variant differ by the noise alone.
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


def _watch(stub: replay_pb2_grpc.ReplayServiceStub, num_planned: int, supervisor: Supervisor, stop: StopEvent) -> bool:
    """Wait until every episode has ended; False if a stop was asked for first."""
    started_s, last_told = time.monotonic(), -1
    while not stop.wait(_POLL_S):
        supervisor.watch()
        status = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=_CALL_S, wait_for_ready=True)
        num_faulted = sum(queue.num_faulted for queue in status.queues)
        num_ended = num_faulted + sum(queue.num_finished for queue in status.queues)
        if num_ended != last_told:
            elapsed_s = time.monotonic() - started_s
            num_succeeded = sum(queue.num_succeeded for queue in status.queues)
            told = f"{num_ended} of {num_planned} episodes, {num_succeeded} successes, {num_faulted} faults"
            print(f"{elapsed_s:6.0f} s  {told}", flush=True)
            last_told = num_ended
        if num_ended >= num_planned:
            return True
    return False
