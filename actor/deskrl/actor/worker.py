"""One desktop's worker: a lease, an episode, its delivery, a fresh desktop, again. Knows no step of an episode.

A desktop that hung, died or was interrupted is closed in the background while a fresh one starts; other workers of the
process go on meanwhile. The reset for the next episode runs while the result of the last one is being acknowledged;
work is asked for only once a desktop is ready, so a lease never waits for one. (In lock-step all of them are reset at
the beginning of a round, when the learner is done, as batched trainers do it.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial

from deskrl.actor import metrics
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.players import Player, ScriptedPlayer
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.episode import Episode, Fault, answers, describe
from deskrl.actor.episode_stream import EpisodeStream
from deskrl.actor.leases import Lease, LeaseLost, ReplayRefused
from deskrl.actor.metrics import DesktopState
from deskrl.actor.replay_client import ReplayClient
from deskrl.actor.retries import Pauses
from deskrl.actor.tasks.files import Task, parse_task
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError
from deskrl.proto.v1 import rollout_pb2

MAX_FAILED_STARTS = 5
"""So many desktops in a row that do not start, and this machine cannot run any."""

_log = logging.getLogger(__name__)

End = rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault


class DesktopsDoNotStart(RuntimeError):
    """One fresh desktop after the other failed to start."""


class Worker:
    """Plays episodes on one desktop at a time until cancelled or drained.

    Args:
        replay: where work comes from and goes to.
        make_player: the served policy, as it plays one episode.
        agent: how it is prompted.
        make_desktop: a new desktop, not started.
        config: deadlines.
        lock_step: wait for the other desktops before each turn, and reset once a round has begun.
        evaluate_format_errors: see `Episode`.
    """

    def __init__(
        self,
        replay: ReplayClient,
        make_player: Callable[[rollout_pb2.Rollout], Player],
        agent: Agent,
        make_desktop: Callable[[], Desktop],
        config: DesktopConfig,
        lock_step: bool = False,
        evaluate_format_errors: bool = False,
    ) -> None:
        self._replay = replay
        self._make_player = make_player
        self._agent = agent
        self._make_desktop = make_desktop
        self._config = config
        self._lock_step = lock_step
        self._evaluate_format_errors = evaluate_format_errors
        self._desktop: Desktop | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._gauge = metrics.StateGauge()
        self._reset_ms = 0.0
        self._draining = False
        self.lease: Lease | None = None
        """The work in hand; None while there is none."""

    def drain(self) -> None:
        """Take no new work once that in hand is delivered."""
        self._draining = True

    async def run(self) -> None:
        """Work until drained.

        Raises:
            DesktopsDoNotStart: this machine runs no desktop.
            UserError: as replay or the desktop's provider refuse their input.
        """
        if not self._lock_step:
            await self._renew()
        while not self._draining:
            self._gauge.enter(DesktopState.IDLE)
            await self._rest()
            self.lease = await self._replay.acquire()
            if self._lock_step:
                await self._renew()
            await self._work(self.lease)
            self.lease = None

    async def close(self) -> None:
        """End the desktop, and wait for those that are still being closed."""
        self._discard()
        self._gauge.leave()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _rest(self) -> None:
        """Let the desktop sleep until there is work; one that fails at that is found dead by then."""
        with contextlib.suppress(DesktopError):
            if self._desktop is not None:
                await self._desktop.idle()

    async def _work(self, lease: Lease) -> None:
        if not await self._is_usable():  # it died while it was idle
            await self._replace()
        stream = self._replay.open_episode(lease)
        try:
            end = await self._play_while_leased(lease, stream)
            await asyncio.gather(self._deliver(lease, stream, end), self._prepare_next(end))
        finally:
            await stream.abandon()

    async def _prepare_next(self, end: End | None) -> None:
        """Have a desktop ready for the next episode; in lock-step its reset is part of the next round."""
        if not _leaves_desktop(end):
            metrics.DESKTOPS_REPLACED.inc()
            self._discard()
        if not self._lock_step:
            await self._renew()

    async def _play_while_leased(self, lease: Lease, stream: EpisodeStream) -> End | None:
        """How the episode ended; None if replay would not take it any more before it did."""
        playing = asyncio.create_task(self._play(lease, stream))
        over = asyncio.create_task(lease.over.wait())
        try:
            await asyncio.wait({playing, over}, return_when=asyncio.FIRST_COMPLETED)
            return playing.result() if playing.done() else None
        finally:
            for task in (playing, over):
                task.cancel()
            await asyncio.wait({playing, over})

    async def _play(self, lease: Lease, stream: EpisodeStream) -> End:
        rollout = lease.rollout
        try:
            return await self._episode(lease, stream).play(self._reset_ms)
        except Fault as fault:
            kind, message = fault.kind, str(fault)
        except UserError as error:
            kind, message = rollout_pb2.FAULT_KIND_TASK_SETUP, str(error)
        except Exception as error:  # our own mistake ends one episode, told to replay, and not the other desktops
            _log.exception("%s: the actor failed", rollout.episode_id)
            kind, message = rollout_pb2.FAULT_KIND_ACTOR, describe(error)
        return rollout_pb2.EpisodeFault(kind=kind, message=message)

    def _episode(self, lease: Lease, stream: EpisodeStream) -> Episode:
        assert self._desktop is not None
        rollout = lease.rollout
        task = parse_task(rollout.task_json, f"task {rollout.task_id}")
        conversation = self._agent.begin(task.instruction)
        player = self._player(rollout, task)
        return Episode(
            self._desktop,
            task,
            rollout,
            conversation,
            player,
            stream,
            self._config,
            enter=self._gauge.enter,
            evaluate_format_errors=self._evaluate_format_errors,
            await_turn=partial(self._replay.await_turn, lease) if self._lock_step else None,
        )

    def _player(self, rollout: rollout_pb2.Rollout, task: Task) -> Player:
        if rollout.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED:
            return ScriptedPlayer(task)
        return self._make_player(rollout)

    async def _deliver(self, lease: Lease, stream: EpisodeStream, end: End | None) -> None:
        """Bring the end of an episode to replay; what it refuses as it is becomes a fault of this actor."""
        episode_id = lease.rollout.episode_id
        try:
            if end is not None:
                await stream.finish(end)
                _count(episode_id, end)
            elif isinstance(lease.error, ReplayRefused):
                await self._report_refusal(lease)
        except ReplayRefused as refusal:
            _log.error("%s: replay does not take it: %s", episode_id, refusal)
        except LeaseLost:
            pass
        finally:
            self._replay.forget(lease)
        if isinstance(lease.error, LeaseLost):
            metrics.LEASES_LOST.inc()
            _log.warning("%s: abandoned: %s", episode_id, lease.error)

    async def _report_refusal(self, lease: Lease) -> None:
        """Tell replay of an episode that it refused, as a fault on a stream of its own."""
        again = Lease(lease.id, lease.rollout, lease.ttl_s)
        fault = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_ACTOR, message=f"refused: {lease.error}")
        await self._replay.open_episode(again).finish(fault)
        _count(lease.rollout.episode_id, fault)

    async def _is_usable(self) -> bool:
        return self._desktop is not None and await answers(self._desktop.is_alive(), self._config.step_timeout_s)

    async def _replace(self) -> None:
        """Have a fresh desktop in place of the present one, which is closed in the background."""
        metrics.DESKTOPS_REPLACED.inc()
        self._discard()
        await self._renew()

    async def _renew(self) -> None:
        """Reset the desktop, or start a fresh one where there is none or it fails."""
        pauses = Pauses()
        reason = ""
        for attempt in range(MAX_FAILED_STARTS):
            if attempt:
                await pauses.take()
            self._gauge.enter(DesktopState.RESETTING if self._desktop else DesktopState.REPLACING)
            desktop = self._desktop = self._desktop or self._make_desktop()
            started_s = time.monotonic()
            try:
                async with asyncio.timeout(self._config.start_timeout_s):
                    await desktop.reset()
            except (DesktopError, OSError) as error:  # a full disk, a time-out
                reason = describe(error)
                _log.warning("a desktop did not come up: %s", reason)
                self._discard()
                continue
            reset_s = time.monotonic() - started_s
            self._reset_ms = 1000 * reset_s
            metrics.RESET_SECONDS.observe(reset_s)
            return
        raise DesktopsDoNotStart(f"{MAX_FAILED_STARTS} desktops in a row did not start; the last: {reason}")

    def _discard(self) -> None:
        """Close the desktop in the background."""
        if self._desktop is not None:
            closing = asyncio.create_task(self._desktop.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._desktop = None


def _leaves_desktop(end: End | None) -> bool:
    """Whether an episode ended on a desktop that can be reset; else it may be dead, or in the midst of something."""
    if not isinstance(end, rollout_pb2.EpisodeResult):
        return False
    return end.termination != rollout_pb2.TERMINATION_DESKTOP_DESTROYED


def _count(episode_id: str, end: End) -> None:
    if isinstance(end, rollout_pb2.EpisodeFault):
        kind = metrics.fault_label(end.kind)
        metrics.FAULTS.labels(kind).inc()
        _log.warning("%s: fault %s: %s", episode_id, kind, end.message)
    else:
        termination = metrics.termination_label(end.termination)
        metrics.EPISODES.labels(termination).inc()
        _log.info("%s: %s, reward %.2f, %d steps", episode_id, termination, end.reward, end.num_steps)
