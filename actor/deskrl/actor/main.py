"""The actor process: workers on desktops, and an orderly end. Knows the life of the process, nothing of episodes.

SIGTERM and SIGINT drain: no new work, two seconds for what is all but done, the rest given back to replay, desktops
closed. All of it together takes less than `DRAIN_S`. After a kill -9 the desktops end with their parent, and what
should still be left is removed by the next actor's start.
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

from deskrl.actor.agent.conversation import make_agent
from deskrl.actor.agent.external_policy import ExternalPolicy
from deskrl.actor.agent.joined import follow_joined
from deskrl.actor.agent.players import Player, sampled_player
from deskrl.actor.agent.policy_client import PolicyClient
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.provider import make_desktop, reap
from deskrl.actor.replay_client import ReplayClient
from deskrl.actor.worker import DesktopsDoNotStart, Worker
from deskrl.core.allocator import keep_freed_memory
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.exposition import expose
from deskrl.core.ids import new_id
from deskrl.core.lifetime import StopEvent, die_with_parent, stop_event
from deskrl.proto.v1 import rollout_pb2

FINISH_S = 2.0
"""How long running episodes may go on when the process is asked to end."""
DRAIN_S = 8.0
"""From the request to end to the end."""

_log = logging.getLogger(__name__)


def run(config: RunConfig, actor: int | None = 0) -> int:
    """Play episodes until a signal ends it; returns the exit status.

    Args:
        config: the run.
        actor: number of this process among the run's actors, from 0; None: one of as many as a launcher likes.

    Raises:
        UserError: bad input, as it comes to light.
    """
    stop = stop_event()
    die_with_parent()
    keep_freed_memory()
    num_desktops = desktops_of(config, actor)
    if config.actor.metrics_port:
        expose(config.security.metrics_host, config.actor.metrics_port + (actor or 0), "actor.metrics_port")
    if num_reaped := reap(config.desktop, desktops_folder(config)):
        _log.warning("ended %d desktops that a killed actor left", num_reaped)
    try:
        return asyncio.run(_run(config, actor, num_desktops, stop))
    finally:
        with contextlib.suppress(OSError):  # desktops of other actors still live in it
            desktops_folder(config).rmdir()


def desktops_of(config: RunConfig, actor: int | None) -> int:
    """How many desktops actor number `actor` drives, so that all actors together drive `num_envs`."""
    per_actor, num_envs = config.actor.desktops_per_actor, config.desktop.num_envs
    if actor is None:
        return per_actor
    if not 0 <= actor < config.num_actors:
        raise UserError(
            f"there is no actor {actor}: {num_envs} desktops, {per_actor} per actor, make {config.num_actors}",
            "count actors from 0, or raise desktop.num_envs",
        )
    return min(per_actor, num_envs - actor * per_actor)


def desktops_folder(config: RunConfig) -> Path:
    """Where the desktops of a run live: a short path (Unix sockets lie there) that follows from the run's folder."""
    name = hashlib.sha256(str(config.folder).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"deskrl-desktops-{name}"


async def _run(config: RunConfig, actor: int | None, num_desktops: int, stop: StopEvent) -> int:
    name = f"actor-{socket.gethostname() if actor is None else actor}.{os.getpid()}"
    replay = ReplayClient(config.replay.address, name)
    policy = PolicyClient(config.inference, name, config.actor.act_timeout_s)
    make_player: Callable[[rollout_pb2.Rollout], Player] = partial(sampled_player, policy)
    if config.inference.external_url is not None:
        make_player = ExternalPolicy(config.inference, config.actor.act_timeout_s).player
    agent = make_agent(config.agent)

    def fresh_desktop() -> Desktop:
        return make_desktop(config.desktop, new_id("desktop"), desktops_folder(config))

    lock_step = config.replay.schedule == "lock_step"
    judges_all = config.agent.format_error == "evaluate"
    workers = [
        Worker(replay, make_player, agent, fresh_desktop, config.desktop, lock_step, judges_all)
        for _ in range(num_desktops)
    ]
    _log.info("driving %d desktops", num_desktops)
    heartbeat = asyncio.create_task(replay.keep_alive(config.replay.lease_ttl_s))
    following = asyncio.create_task(follow_joined(config.replay.address, name, policy.set_joined))
    stopping = asyncio.create_task(stop.wait_async())
    running = {asyncio.create_task(worker.run()): worker for worker in workers}
    try:
        await asyncio.wait({stopping, heartbeat, *running}, return_when=asyncio.FIRST_COMPLETED)
        return _status([heartbeat, *running])
    finally:
        try:
            async with asyncio.timeout(DRAIN_S):
                await _drain(running, replay)
                await asyncio.gather(*(worker.close() for worker in workers))
        except TimeoutError:
            _log.warning("not all was given back and closed in time: leases run out, desktops end with this process")
        for task in (heartbeat, following, stopping):
            task.cancel()
        await asyncio.gather(replay.close(), policy.close())


def _status(tasks: list[asyncio.Task[None]]) -> int:
    """0 if all goes well so far; else what went wrong is raised, or told and 1."""
    for task in tasks:
        if task.done():
            try:
                task.result()
            except DesktopsDoNotStart as error:
                _log.error("%s", error)
                return 1
    return 0


async def _drain(running: dict[asyncio.Task[None], Worker], replay: ReplayClient) -> None:
    """Let work that is all but done end, give the rest back."""
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
        _log.info("giving %d episodes back", len(unfinished))
        await replay.release(unfinished)
