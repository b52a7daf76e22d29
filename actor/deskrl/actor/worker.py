"""Worker: runs episodes on one desktop. It acquires a lease, runs and delivers the episode, and renews the desktop.

A desktop that hung, died or was interrupted is closed in the background while a fresh one starts; other workers of the
process continue. The reset for the next episode runs while the previous result is being acknowledged. A desktop that
does not start is set aside and retried with growing pauses. A lease is acquired only once a desktop is ready, so it
never waits for one; if the desktop then fails, the lease is released. In the lock-step schedule all desktops are
instead reset at the start of a round, after the learner's update, as synchronous batch trainers do.
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
from deskrl.actor.agent.policies import ActorPolicy, ScriptedPolicy
from deskrl.actor.backoff import Backoff
from deskrl.actor.desktop_starts import DesktopNotReadyError, DesktopStarts, reset_in_time
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.episode import Episode, Fault, is_true_within
from deskrl.actor.episode_sender import EpisodeSender
from deskrl.actor.lease import Lease, LeaseLostError, ReplayRejectedError
from deskrl.actor.lease_client import LeaseClient
from deskrl.actor.metrics import DesktopState
from deskrl.actor.rewards.episode_reward import EpisodeReward
from deskrl.actor.task import Task
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError
from deskrl.proto.v1 import rollout_pb2

FIRST_RETRY_S = 0.5
"""Pause in seconds before the second attempt to start a desktop; each further pause is twice as long."""
LONGEST_RETRY_S = 60.0
"""Longest pause in seconds between attempts to start a desktop."""

_log = logging.getLogger(__name__)

End = rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault


class Worker:
    """Runs episodes on one desktop at a time until it is cancelled or drained.

    Args:
        leases: lease client of the process.
        make_policy: returns the served or external policy for one rollout.
        agent: prompt format and action language of the policy.
        make_desktop: returns a new desktop that has not been started.
        starts: record of the start attempts of all desktops of the process.
        config: timeouts.
        lock_step: wait for the other desktops before each step, and reset the desktop at the start of a round.
        evaluate_format_errors: see `Episode`.
        reward: reward of the end states.
        vary_task: returns the variant of a task that is played in a rollout.
    """

    def __init__(
        self,
        leases: LeaseClient,
        make_policy: Callable[[rollout_pb2.Rollout], ActorPolicy],
        agent: Agent,
        make_desktop: Callable[[], Desktop],
        starts: DesktopStarts,
        config: DesktopConfig,
        lock_step: bool = False,
        evaluate_format_errors: bool = False,
        *,
        reward: EpisodeReward,
        vary_task: Callable[[Task, rollout_pb2.Rollout], Task] = lambda task, rollout: task,
    ) -> None:
        self._leases = leases
        self._make_policy = make_policy
        self._agent = agent
        self._make_desktop = make_desktop
        self._starts = starts
        self._config = config
        self._lock_step = lock_step
        self._evaluate_format_errors = evaluate_format_errors
        self._reward = reward
        self._vary_task = vary_task
        self._desktop: Desktop | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._gauge = metrics.StateGauge()
        self._reset_ms = 0.0
        self._draining = False
        self.lease: Lease | None = None
        """Lease of the running episode; None while idle."""

    def drain(self) -> None:
        """Stop once the running episode is delivered."""
        self._draining = True

    async def run(self) -> None:
        """Run episodes until drained.

        Raises:
            DesktopStartError: no desktop of the process could be started for too long.
            UserError: the replay service or the desktop provider rejected the configuration.
        """
        while not self._draining:
            if self._gauge.state is DesktopState.SET_ASIDE or not (self._desktop or self._lock_step):
                await self._start_with_retries()
            self._gauge.enter(DesktopState.IDLE)
            await self._idle()
            self.lease = await self._leases.acquire()
            if await self._prepare_for_lease():
                await self._serve(self.lease)
            else:
                await self._leases.release([self.lease])
            self.lease = None

    async def close(self) -> None:
        """Close the desktop, and wait until all desktops are closed."""
        self._discard()
        self._gauge.remove()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _idle(self) -> None:
        """Let the desktop idle until a lease is acquired. If it dies meanwhile, `_is_usable` detects it."""
        with contextlib.suppress(DesktopError):
            if self._desktop is not None:
                await self._desktop.idle()

    async def _prepare_for_lease(self) -> bool:
        """Return whether the desktop is usable, after a reset in the lock-step schedule or a replacement if it died."""
        if not self._lock_step:
            if await self._is_usable():
                return True
            metrics.DESKTOPS_REPLACED.inc()
            self._discard()
        return await self._renew()

    async def _serve(self, lease: Lease) -> None:
        """Run the episode of a lease, then deliver it while the desktop is renewed."""
        sender = self._leases.open_episode(lease)
        try:
            end = await self._run_while_leased(lease, sender)
            await asyncio.gather(self._deliver(lease, sender, end), self._prepare_next(end))
        finally:
            await sender.abandon()

    async def _prepare_next(self, end: End | None) -> None:
        """Prepare a desktop for the next episode. In the lock-step schedule the next round resets it."""
        if not is_desktop_reusable(end):
            metrics.DESKTOPS_REPLACED.inc()
            self._discard()
        if not self._lock_step:
            await self._renew()

    async def _run_while_leased(self, lease: Lease, sender: EpisodeSender) -> End | None:
        """Return how the episode ended; None if the lease ended first."""
        running = asyncio.create_task(self._run_episode(lease, sender))
        lease_ended = asyncio.create_task(lease.ended.wait())
        try:
            await asyncio.wait({running, lease_ended}, return_when=asyncio.FIRST_COMPLETED)
            return running.result() if running.done() else None
        finally:
            for task in (running, lease_ended):
                task.cancel()
            await asyncio.wait({running, lease_ended})

    async def _run_episode(self, lease: Lease, sender: EpisodeSender) -> End:
        return await run_to_end(partial(self._make_episode, lease, sender), lease.rollout.episode_id, self._reset_ms)

    def _make_episode(self, lease: Lease, sender: EpisodeSender) -> Episode:
        assert self._desktop is not None
        rollout = lease.rollout
        task = self._vary_task(parse_task(rollout.task_json, f"task {rollout.task_id}"), rollout)
        return Episode(
            self._desktop,
            task,
            rollout,
            self._agent.start_conversation,
            self._policy_for(rollout, task),
            sender,
            self._config,
            enter=self._gauge.enter,
            evaluate_format_errors=self._evaluate_format_errors,
            await_step=partial(self._leases.await_step, lease) if self._lock_step else None,
            reward=self._reward,
        )

    def _policy_for(self, rollout: rollout_pb2.Rollout, task: Task) -> ActorPolicy:
        if rollout.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED:
            return ScriptedPolicy(task)
        return self._make_policy(rollout)

    async def _deliver(self, lease: Lease, sender: EpisodeSender, end: End | None) -> None:
        """Send the end of an episode. An episode that the replay service rejected is reported as a fault."""
        episode_id = lease.rollout.episode_id
        try:
            if end is not None:
                await sender.finish(end)
                _record(episode_id, end)
            elif isinstance(lease.error, ReplayRejectedError):
                await self._report_rejection(lease)
        except ReplayRejectedError as error:
            _log.error("%s: rejected by replay: %s", episode_id, error)
        except LeaseLostError:
            pass
        finally:
            self._leases.forget(lease)
        if isinstance(lease.error, LeaseLostError):
            metrics.LEASES_LOST.inc()
            _log.warning("%s: abandoned: %s", episode_id, lease.error)

    async def _report_rejection(self, lease: Lease) -> None:
        """Report an episode that the replay service rejected as a fault, on a new stream."""
        new_lease = Lease(lease.id, lease.rollout, lease.ttl_s)
        fault = rollout_pb2.EpisodeFault(
            kind=rollout_pb2.FAULT_KIND_ACTOR, message=f"rejected by replay: {lease.error}"
        )
        await self._leases.open_episode(new_lease).finish(fault)
        _record(lease.rollout.episode_id, fault)

    async def _is_usable(self) -> bool:
        return self._desktop is not None and await is_true_within(self._desktop.is_alive(), self._config.step_timeout_s)

    async def _start_with_retries(self) -> None:
        """Start a fresh desktop, with growing pauses between attempts.

        Raises:
            DesktopStartError: no desktop of the process could be started for too long.
        """
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S)
        while not await self._renew():
            await backoff.sleep()

    async def _renew(self) -> bool:
        """Reset the desktop, or start a fresh one if there is none; return False and set it aside if that fails.

        Raises:
            DesktopStartError: no desktop of the process could be started for too long.
        """
        is_retry = self._gauge.state is DesktopState.SET_ASIDE
        if not is_retry:
            self._gauge.enter(DesktopState.RESETTING if self._desktop else DesktopState.REPLACING)
        desktop = self._desktop = self._desktop or self._make_desktop()
        started_s = time.monotonic()
        try:
            await reset_in_time(desktop, self._config.start_timeout_s)
        except DesktopNotReadyError as error:
            _log.warning("a desktop did not start, is set aside and retried: %s", error)
            metrics.START_FAILURES.inc()
            self._discard()
            self._gauge.enter(DesktopState.SET_ASIDE)
            self._starts.record_failure(self, str(error))
            return False
        if is_retry:
            _log.info("a desktop that was set aside has started")
            self._gauge.enter(DesktopState.IDLE)
        self._starts.record_success(self)
        reset_s = time.monotonic() - started_s
        self._reset_ms = 1000 * reset_s
        metrics.RESET_SECONDS.observe(reset_s)
        return True

    def _discard(self) -> None:
        """Close the desktop in the background."""
        if self._desktop is not None:
            closing = asyncio.create_task(self._desktop.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._desktop = None


async def run_to_end(make_episode: Callable[[], Episode], episode_id: str, reset_ms: float) -> End:
    """Run an episode and return its result, or the fault that ended it; every error is a fault.

    Args:
        make_episode: returns the episode; its errors are faults too.
        episode_id: name of the episode in the log.
        reset_ms: duration of the desktop's reset in milliseconds.
    """
    try:
        return await make_episode().run(reset_ms)
    except Fault as fault:
        kind, message = fault.kind, str(fault)
    except UserError as error:
        kind, message = rollout_pb2.FAULT_KIND_TASK_SETUP, str(error)
    except Exception as error:  # a defect of the actor ends one episode with a fault; other desktops continue
        _log.exception("%s: the episode failed", episode_id)
        kind, message = rollout_pb2.FAULT_KIND_ACTOR, typed_line(error)
    return rollout_pb2.EpisodeFault(kind=kind, message=message)


def is_desktop_reusable(end: End | None) -> bool:
    """Return whether the desktop can be reset after an episode; otherwise it may be dead or still be busy."""
    broken = (rollout_pb2.TERMINATION_DESKTOP_DESTROYED, rollout_pb2.TERMINATION_STATE_UNREADABLE)
    return isinstance(end, rollout_pb2.EpisodeResult) and end.termination not in broken


def _record(episode_id: str, end: End) -> None:
    """Count and log the end of an episode."""
    if isinstance(end, rollout_pb2.EpisodeFault):
        kind = metrics.fault_label(end.kind)
        metrics.FAULTS.labels(kind).inc()
        _log.warning("%s: fault %s: %s", episode_id, kind, end.message)
    else:
        termination = metrics.termination_label(end.termination)
        metrics.EPISODES.labels(termination).inc()
        _log.info("%s: %s, reward %.2f, %d steps", episode_id, termination, end.reward, end.num_steps)
