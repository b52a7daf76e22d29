"""Actor process: starts one worker per desktop and drains them on SIGTERM or SIGINT.

Draining takes at most `DRAIN_S`: no new lease is acquired, running episodes may finish for `FINISH_S`, the remaining
leases are released and the desktops closed. After SIGKILL the desktops end with their parent process, and the next
actor removes what they leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.external_apis import policy_opener
from deskrl.actor.agent.inference_client import InferenceClient
from deskrl.actor.agent.policies import ActorPolicy, open_served_policy
from deskrl.actor.agent.replica_discovery import poll_replicas
from deskrl.actor.desktop_starts import DesktopStartError, DesktopStarts
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.provider_registry import make_desktop, reap_desktops, select_provider
from deskrl.actor.extensions import check_extensions
from deskrl.actor.lease_client import LeaseClient
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.tasks.noise import add_rollout_noise
from deskrl.actor.worker import Worker
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import new_id
from deskrl.core.malloc_tuning import keep_freed_memory
from deskrl.core.metrics_server import serve_metrics
from deskrl.core.process_lifecycle import StopEvent, die_with_parent, stop_event
from deskrl.proto.v1 import rollout_pb2

FINISH_S = 2.0
"""Time in seconds for which running episodes may continue after the process was asked to stop."""
DRAIN_S = 8.0
"""Maximum time in seconds between the request to stop and the end of the process."""

_log = logging.getLogger(__name__)


def run(config: RunConfig, actor: int | None = 0) -> int:
    """Run episodes until a signal arrives, and return the exit status.

    Args:
        config: run configuration.
        actor: index of this process among the run's actors, from 0; None if a launcher chooses the number of actors.

    Raises:
        UserError: the configuration is invalid, or the replay service rejects this actor.
    """
    stop = stop_event()
    die_with_parent()
    keep_freed_memory()
    num_desktops = num_desktops_of(config, actor)
    check_extensions(config)
    if config.actor.metrics_port:
        serve_metrics(config.security.metrics_host, config.actor.metrics_port + (actor or 0), "actor.metrics_port")
    if num_reaped := reap_desktops(config.desktop, desktops_dir(config)):
        _log.warning("removed %d desktops that a killed actor left", num_reaped)
    try:
        return asyncio.run(_run(config, actor, num_desktops, stop))
    finally:
        with contextlib.suppress(OSError):  # not empty while other actors have desktops
            desktops_dir(config).rmdir()


def num_desktops_of(config: RunConfig, actor: int | None) -> int:
    """Return the number of desktops of one actor; all actors together have `desktop.num_envs`.

    Args:
        config: run configuration.
        actor: see `run`.

    Raises:
        UserError: the run has no actor with this index.
    """
    per_actor, num_envs = config.actor.desktops_per_actor, config.desktop.num_envs
    if actor is None:
        return per_actor
    if not 0 <= actor < config.num_actors:
        raise UserError(
            f"there is no actor {actor}: {num_envs} desktops, {per_actor} per actor, need {config.num_actors} actors",
            "count actors from 0, or raise desktop.num_envs",
        )
    return min(per_actor, num_envs - actor * per_actor)


def desktops_dir(config: RunConfig) -> Path:
    """Return the directory of the run's desktops, derived from the run directory.

    The path is short because it contains Unix sockets, whose paths are limited to about 100 bytes.
    """
    name = hashlib.sha256(str(config.run_dir).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"deskrl-desktops-{name}"


def longest_socket_path(config: RunConfig, root: Path) -> Path | None:
    """Return the longest path of a socket of the run's desktops, if `root` is the directory for temporary files.

    None if they have no sockets.
    """
    name = select_provider(config.desktop).provider.socket_name
    if name is None:
        return None
    return root / desktops_dir(config).name / new_id("desktop") / name


async def _run(config: RunConfig, actor: int | None, num_desktops: int, stop: StopEvent) -> int:
    name = f"actor-{socket.gethostname() if actor is None else actor}.{os.getpid()}"
    leases = LeaseClient(config.replay.address, name)
    inference = InferenceClient(config.inference, name, config.actor.act_timeout_s)
    starts = DesktopStarts(config.desktop.start_retry_timeout_s)
    workers = _make_workers(config, num_desktops, leases, inference, starts)
    _log.info("running episodes on %d desktops", num_desktops)
    heartbeat = asyncio.create_task(leases.keep_alive(config.replay.lease_ttl_s, starts))
    discovery = asyncio.create_task(poll_replicas(config.replay.address, name, inference.set_joined))
    stopping = asyncio.create_task(stop.wait_async())
    running = {asyncio.create_task(worker.run()): worker for worker in workers}
    try:
        await asyncio.wait({stopping, heartbeat, *running}, return_when=asyncio.FIRST_COMPLETED)
        return _exit_status([heartbeat, *running])
    finally:
        try:
            async with asyncio.timeout(DRAIN_S):
                await _drain(running, leases)
                await asyncio.gather(*(worker.close() for worker in workers))
        except TimeoutError:
            _log.warning("draining timed out: remaining leases expire, desktops end with this process")
        for task in (heartbeat, discovery, stopping):
            task.cancel()
        await asyncio.gather(leases.close(), inference.close())


def _make_workers(
    config: RunConfig, num_desktops: int, leases: LeaseClient, inference: InferenceClient, starts: DesktopStarts
) -> list[Worker]:
    make_policy: Callable[[rollout_pb2.Rollout], ActorPolicy] = partial(open_served_policy, inference)
    if config.inference.external_url is not None:
        make_policy = policy_opener(config)
    agent = Agent(config.agent)
    reward = make_reward(config)

    def make_fresh_desktop() -> Desktop:
        return make_desktop(config.desktop, new_id("desktop"), desktops_dir(config))

    return [
        Worker(
            leases,
            make_policy,
            agent,
            make_fresh_desktop,
            starts,
            config.desktop,
            lock_step=config.replay.schedule == "lock_step",
            evaluate_format_errors=config.agent.format_error == "evaluate",
            reward=reward,
            vary_task=partial(add_rollout_noise, config=config),
        )
        for _ in range(num_desktops)
    ]


def _exit_status(tasks: list[asyncio.Task[None]]) -> int:
    """Return 0 if no task has failed and 1 if desktops do not start; raise any other exception of a task."""
    for task in tasks:
        if task.done():
            try:
                task.result()
            except DesktopStartError as error:
                _log.error("%s", error)
                return 1
    return 0


async def _drain(running: dict[asyncio.Task[None], Worker], leases: LeaseClient) -> None:
    """Wait up to `FINISH_S` for running episodes, then cancel the workers and release their leases."""
    for task, worker in running.items():
        worker.drain()
        if worker.lease is None:
            task.cancel()
    await asyncio.wait(running, timeout=FINISH_S)
    unfinished = [worker.lease for worker in running.values() if worker.lease is not None]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    if unfinished:
        _log.info("releasing the leases of %d unfinished episodes", len(unfinished))
        await leases.release(unfinished)
