"""Reward term: one configured reward, computed within its time limit, with its errors classified.

Errors of the task's own evaluator are left as they are. Those of any other reward become EvaluatorError, a fault of the
kind `evaluator`, except for the desktop's:

    the desktop was lost                                                      DesktopGone
    an operation that the desktop has failed, or was not done in time         UnreadableStateError
    anything else: any other exception, the time limit, an invalid value      EvaluatorError
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from numbers import Real
from typing import Any

from deskrl.actor.desktops.base import DesktopError, DesktopGone, UnsupportedOperation
from deskrl.actor.rewards.desktop_handle import DesktopHandle
from deskrl.actor.rewards.reward_interface import EndedEpisode, Score
from deskrl.actor.rewards.reward_registry import REWARDS
from deskrl.actor.rewards.task_evaluators import TaskEvaluators
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError
from deskrl.core.config import RewardTermConfig
from deskrl.core.error_text import chain_of, typed_line
from deskrl.core.errors import UserError

MAX_ABANDONED_THREADS = 8
"""Number of calls of a plain function that may continue after their time limit; no thread can be ended."""
MAX_EVIDENCE_CHARACTERS = 4000
"""Limit on the evidence of a reward as JSON; longer evidence is cut and stored as text."""
_CANCEL_S = 1.0
"""Time in seconds within which a coroutine that is cancelled has to end."""


class RewardTerm:
    """One term of the reward.

    Args:
        name: name of the term.
        config: kind, options, weight and time limit.
        evaluate_timeout_s: time limit in seconds if the term has none of its own.

    Raises:
        UserError: the kind or its options are invalid.
    """

    def __init__(self, name: str, config: RewardTermConfig, evaluate_timeout_s: float) -> None:
        self.name = name
        self.weight = config.weight
        self.timeout_s = config.timeout_s or evaluate_timeout_s
        key = f"reward.terms.{name}"
        selected = REWARDS.select(config.kind, config.options, key=f"{key}.kind", options_key=f"{key}.options")
        reward, arguments = selected.implementation, [] if selected.options is None else [selected.options]
        if inspect.isclass(reward):
            reward = _construct(f"{key}: {config.kind}", partial(reward, *arguments))
            self._score: Callable[[EndedEpisode], Any] = reward.score
        else:
            self._score = lambda episode: reward(episode, *arguments)
        self.is_task_evaluator = isinstance(reward, TaskEvaluators)
        self.needs_session = bool(getattr(reward, "needs_session", False))
        self._is_async = inspect.iscoroutinefunction(getattr(reward, "score", reward))
        self._threads = _Threads()

    async def score(self, episode: EndedEpisode) -> Score:
        """Return the value of the term.

        Raises:
            EvaluatorError: the reward is defective.
            UnreadableStateError: the state of the desktop cannot be read.
            DesktopGone: the desktop no longer exists.
            Exception: anything else that the task's own evaluator raises.
        """
        if self.is_task_evaluator:
            return await self._score(episode)  # type: ignore[no-any-return]
        result = await self._run(episode)
        if episode.desktop.lost is not None:
            raise episode.desktop.lost
        return self._checked(result)

    async def _run(self, episode: EndedEpisode) -> Any:
        """Run the reward as a task of its own, so that even one that ignores its cancellation ends in time."""
        running = asyncio.ensure_future(self._call(episode))
        try:
            await asyncio.wait({running}, timeout=self.timeout_s)
            if not running.done():
                raise self._timeout_error(episode.desktop)
        finally:
            running.cancel()
            await asyncio.wait({running}, timeout=_CANCEL_S)
        if running.cancelled():
            raise EvaluatorError(f"reward {self.name}: cancelled itself")
        if (error := running.exception()) is not None:
            raise self._classified(error, episode.desktop) from error
        return running.result()

    async def _call(self, episode: EndedEpisode) -> Any:
        try:
            result = await (self._score(episode) if self._is_async else self._threads.run(self._score, episode))
            return await result if inspect.isawaitable(result) else result
        except (SystemExit, KeyboardInterrupt) as error:  # would end the event loop
            raise EvaluatorError(typed_line(error)) from error

    def _timeout_error(self, desktop: DesktopHandle) -> Exception:
        if desktop.has_pending_operation:
            problem = f"an operation on the desktop was not done within {self.timeout_s:g} s"
            return UnreadableStateError(f"reward {self.name}: {problem}")
        return EvaluatorError(f"reward {self.name}: not done within {self.timeout_s:g} s")

    def _classified(self, error: BaseException, desktop: DesktopHandle) -> Exception:
        if desktop.lost is not None:
            return DesktopGone(str(desktop.lost))
        if isinstance(error, EvaluatorError):
            return EvaluatorError(f"reward {self.name}: {error}")
        for cause in chain_of(error):
            is_of_desktop = isinstance(cause, DesktopError | UnreadableStateError)
            if is_of_desktop and not isinstance(cause, UnsupportedOperation):
                return UnreadableStateError(f"reward {self.name}: {cause}")
        return EvaluatorError(f"reward {self.name}: {typed_line(error)}")

    def _checked(self, result: Any) -> Score:
        score = result if isinstance(result, Score) else Score(result)
        if not isinstance(score.value, Real) or math.isnan(score.value) or not 0 <= score.value <= 1:
            raise EvaluatorError(f"reward {self.name}: returned {score.value!r:.100}, not a number in [0, 1]")
        return Score(float(score.value), self._bounded(score.evidence))

    def _bounded(self, evidence: Any) -> Any:
        """Return evidence as JSON values of limited size."""
        try:
            text = json.dumps(evidence, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise EvaluatorError(f"reward {self.name}: its evidence is not JSON: {typed_line(error)}") from error
        return evidence if len(text) <= MAX_EVIDENCE_CHARACTERS else text[:MAX_EVIDENCE_CHARACTERS] + "…"


async def readable(operation: Awaitable[None]) -> None:
    """Await an operation of the desktop; its failure is a state that cannot be read."""
    try:
        await operation
    except DesktopGone:
        raise
    except DesktopError as error:
        raise UnreadableStateError(str(error)) from error


def _construct(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} raised while it was constructed: {typed_line(error)}", "correct the reward") from error


class _Threads:
    """Calls of plain functions, each in a daemon thread: one that never returns does not keep the actor from ending."""

    def __init__(self) -> None:
        self._num_abandoned = 0

    async def run(self, function: Callable[[EndedEpisode], Any], episode: EndedEpisode) -> Any:
        if self._num_abandoned >= MAX_ABANDONED_THREADS:
            raise EvaluatorError(f"{self._num_abandoned} earlier calls have not returned")
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def end(result: Any, error: BaseException | None) -> None:
            if ended.cancelled():
                self._num_abandoned -= 1
            else:
                ended.set_result((result, error))

        def call() -> None:
            result, error = None, None
            try:
                result = function(episode)
            except BaseException as raised:  # raised again in the event loop
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(end, result, error)

        threading.Thread(target=call, name="reward", daemon=True).start()
        try:
            result, error = await ended
        except asyncio.CancelledError:
            self._num_abandoned += 1
            raise
        if error is not None:
            raise error
        return result
