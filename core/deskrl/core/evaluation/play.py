"""`deskrl eval`: a checkpoint's replicas, actors and a replay service play a task list, with no learner beside them.

In place of replicas, somebody's own server may act. Nothing publishes weights, so one version acts from the first token
to the last. What was played survives an interruption: the same command goes on. Knows the order of things; what is
kept and told is its neighbours'.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.evaluation import external
from deskrl.core.evaluation.record import QUEUE, collect
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
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc, rollout_pb2

_POLL_S = 0.5
_CALL_S = 30.0
_LINEAGE = "eval"


@dataclass(frozen=True)
class Plan:
    """How often each task is played, and how."""

    repeats: int
    temperature: float


def configure(
    config: RunConfig,
    checkpoint: Path | None,
    name: str,
    tasks: Path | None = None,
    root: Path | None = None,
    suffix: str | None = None,
) -> RunConfig:
    """A run's configuration turned into an evaluation's.

    Args:
        config: how desktops, agent and inference are set up.
        checkpoint: folder of the model; None: an external server has it.
        name: of the evaluation; its folder is one of `runs`.
        tasks: list to play; None: the tasks of the configuration.
        root: folder of the list's task files, as `tasks.root`.
        suffix: of their names, as `tasks.suffix`.
    """
    changes: dict[str, Any] = {"list": tasks, "root": root, "suffix": suffix, "suite": None, "tasks": ()}
    kept = config.tasks if tasks is None else config.tasks.model_copy(update=changes)
    served: dict[str, Any]
    if checkpoint is not None:
        served = {"model": config.model.model_copy(update={"path": checkpoint.resolve(), "build": None})}
    else:
        served = {"inference": config.inference.model_copy(update={"num_replicas": 0})}
    return config.model_copy(
        update={
            "name": name,
            **served,
            "tasks": kept.model_copy(update={"unplayable": "skip" if kept.unplayable == "refuse" else kept.unplayable}),
            "learner": config.learner.model_copy(update={"warm_start": None}),
        }
    )


def evaluate(config: RunConfig, plan: Plan) -> int:
    """Play everything, or tell again what was played.

    Returns:
        The exit status: 0 when it is told, 130 if it was stopped, 1 or 2 if a role ended for good.

    Raises:
        UserError: bad input, or the folder holds an evaluation of something else.
    """
    folder = RunFolder(config.folder)
    stop = stop_event()
    rpc.identify_as("operator", config.security.folder)
    _open_folder(config, plan, folder)
    told = folder.results / "evaluation.json"
    if told.exists():
        _print(json.loads(told.read_text(encoding="utf-8")), folder)
        return 0
    supervisor = Supervisor(folder)
    try:
        summary = _play(config, plan, folder, supervisor, stop)
    except RoleFailed as error:
        return tell_failure(error, folder)
    finally:
        supervisor.close()
    if summary is None:
        print(f"stopped; the same command goes on with {folder.root}")
        return 130
    _print(summary, folder)
    return 0


def _open_folder(config: RunConfig, plan: Plan, folder: RunFolder) -> None:
    """Begin, or go on with what was begun alike."""
    begun = folder.root / "evaluation.json"
    if not begun.exists():
        preflight.refuse_bad_input(config)  # before anything is written
        if config.inference.external_url is not None:
            external.refuse_absent(config.inference)
    now = {"plan": vars(plan), "config": json.loads(config.model_dump_json())}
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != now:
        raise UserError(f"{folder.root} holds another evaluation", "choose another --name, or remove it")
    if not begun.exists() and folder.config.exists():
        raise UserError(f"{folder.root} is the folder of a run", "choose another --name")
    try:
        folder.create()
    except OSError as error:
        raise UserError(f"{folder.root}: nothing can be kept here ({error.strerror})", "choose other --runs") from error
    write_json(begun, now)
    dump_config(config, folder.config)


def _play(
    config: RunConfig, plan: Plan, folder: RunFolder, supervisor: Supervisor, stop: StopEvent
) -> dict[str, Any] | None:
    """The summary; None if it was stopped."""
    importlib.import_module("deskrl.actor.prepare").main(config)
    start_replay(config, folder.config, supervisor)
    replicas = start_replicas(config, folder.config, supervisor)
    for address, name in zip(config.inference.replica_addresses, replicas, strict=True):
        wait_healthy(address, supervisor, name, INFERENCE_START_S)
    start_actors(config, folder.config, supervisor)
    with replay_stub(config) as stub:
        groups = plan_groups(config, plan, json.loads((folder.root / "tasks.json").read_text(encoding="utf-8")))
        request = replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", _LINEAGE), groups=groups)
        stub.PlanGroups(request, timeout=_CALL_S, wait_for_ready=True)
        if not _watch(stub, sum(len(group.seeds) for group in groups), supervisor, stop):
            return None
        supervisor.stop([name for name in supervisor.children if name != "replay"])
        summary = summarise(collect(stub, folder), config.replay.success_above)
    left_out = folder.root / "left_out.json"
    summary["left_out"] = json.loads(left_out.read_text(encoding="utf-8")) if left_out.exists() else {}
    if config.inference.external_url is not None:
        summary["external"] = external.told_of(config.inference)
    write_json(folder.results / "evaluation.json", summary)
    return summary


def plan_groups(config: RunConfig, plan: Plan, tasks: dict[str, Any]) -> list[replay_pb2.GroupPlan]:
    """One group a task, whose members are its repeats; the same for the same configuration."""
    return [
        replay_pb2.GroupPlan(
            group_id=f"{QUEUE}/{task_id}",
            queue=QUEUE,
            task_id=task_id,
            task_json=json.dumps(task).encode(),
            seeds=[ids.derive_seed(config.seed, QUEUE, task_id, number) for number in range(plan.repeats)],
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
        queue = next((queue for queue in status.queues if queue.queue == QUEUE), replay_pb2.QueueStatus())
        num_ended = queue.num_finished + queue.num_faulted
        if num_ended != last_told:
            elapsed_s = time.monotonic() - started_s
            told = f"{num_ended} of {num_planned} episodes, {queue.num_succeeded} successes, {queue.num_faulted} faults"
            print(f"{elapsed_s:6.0f} s  {told}", flush=True)
            last_told = num_ended
        if num_ended >= num_planned:
            return True
    return False


def _print(summary: dict[str, Any], folder: RunFolder) -> None:
    table = Table("", "tasks", "success", "95 %", "average reward", "faults", title=folder.root.name)
    rows: Sequence[tuple[str, dict[str, Any]]] = [
        ("all", summary["all"]),
        ("feasible only", summary["feasible"]),
        *(summary["applications"].items()),
    ]
    for name, rate in rows:
        share = "–" if rate["rate"] is None else f"{rate['rate']:.0%}"
        average = "–" if rate["average_reward"] is None else f"{rate['average_reward']:.2f}"
        success = f"{rate['num_successes']}/{rate['num_episodes']} = {share}"
        interval = f"[{rate['low']:.0%}, {rate['high']:.0%}]"
        table.add_row(name, str(rate["num_tasks"]), success, interval, average, str(rate["num_faulted"]))
    console = Console()
    console.print(table)
    if summary["steps_per_episode"] is not None:
        pace = f"{summary['steps_per_episode']:.1f} steps and {summary['seconds_per_episode']:.1f} s an episode"
        parts = ", ".join(f"{name} {value:g}" for name, value in summary["act_ms"].items())
        console.print(f"{pace}; ms of an act by part: {parts}", highlight=False)
    if (server := summary.get("external")) is not None:
        lost = ", ".join(server["lost"])
        console.print(f"{server['model']} acted at {server['url']}; not known: {lost}", highlight=False)
    if summary["left_out"]:
        console.print(f"{len(summary['left_out'])} tasks are left out; {folder.root / 'left_out.json'} tells why")
    console.print(f"results: {folder.results}", highlight=False, soft_wrap=True)
