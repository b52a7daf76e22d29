"""Contract suite of rewards: what a reward promises, checked on ended episodes.

Derive from `RewardSuite` in a test module, and run it with pytest:

    from deskrl.testing.rewards import RewardSuite

    class TestBrevity(RewardSuite):
        kind = "my_rewards:brevity"

The desktop is a simulated one, which has no files. For a reward that reads files or windows, set `desktop_config`, for
example to `DesktopConfig()` for embedded desktops, and bring the desktop to an end state in `prepare`.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, UnsupportedOperation
from deskrl.actor.desktops.provider_registry import make_desktop, select_provider
from deskrl.actor.rewards.desktop_handle import DesktopHandle
from deskrl.actor.rewards.reward_interface import EndedEpisode, EpisodeAction, Score, ended_episode
from deskrl.actor.rewards.reward_term import RewardTerm
from deskrl.actor.task import Task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RewardTermConfig

T = TypeVar("T")

_POLL_S = 0.02
_SCHEDULING = Path("/proc/thread-self/schedstat")
"""Time on a processor and time of waiting for one, in nanoseconds."""
_SIMULATED = DesktopConfig.model_validate({"provider": "simulated", "simulated": {"time_scale": 1e-6}})
_LIST_FILES = ["find", ".", "-type", "f", "-printf", "%p %s %T@ %m\n"]


class EndedDesktop:
    """Desktop of one task in its end state, and the event loop in which it is judged.

    Args:
        desktop: desktop that is not started.
        task: task to set up on it.
        config: time limits.
    """

    def __init__(self, desktop: Desktop, task: Task, config: DesktopConfig) -> None:
        self._desktop = desktop
        self._task = task
        self._config = config
        self._runner = asyncio.Runner()

    def start(self, prepare: Callable[[Desktop], Coroutine[Any, Any, None]], needs_session: bool) -> None:
        """Bring the desktop to the state in which a reward is computed."""

        async def start() -> None:
            await self._desktop.reset()
            await setup_task(self._desktop, self._task, 0, self._config)
            await prepare(self._desktop)
            await self._desktop.stop_policy_programs()
            if not needs_session:
                await self._desktop.stop_all_programs()

        self._runner.run(start())

    def judge(
        self,
        judge: Callable[[EndedEpisode], Coroutine[Any, Any, T]],
        actions: Sequence[Action],
        terms: Mapping[str, float],
    ) -> T:
        """Return the result of `judge` for an episode with these actions and these values of earlier terms."""

        async def scenario() -> T:
            image = io.BytesIO()
            (await self._desktop.screenshot()).save(image, "PNG")
            final = actions[-1] if actions and actions[-1].ends_episode else None
            steps = [EpisodeAction("", action) for action in actions]
            png_files = [image.getvalue()] * max(1, len(actions))
            episode = ended_episode(self._desktop, self._task, steps, png_files, final, seed=0)
            return await judge(replace(episode, terms=dict(terms)))

        return self._runner.run(scenario())

    def close(self) -> None:
        """Close the desktop and the event loop."""
        self._runner.run(self._desktop.close())
        self._runner.close()


class RewardSuite:
    """Tests of a reward; derive from it in a class whose name starts with Test."""

    kind: ClassVar[str]
    """Value of `reward.terms.NAME.kind`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Value of `reward.terms.NAME.options`."""
    terms: ClassVar[Mapping[str, float]] = {"task": 1.0}
    """Values of the terms that were computed before."""
    timeout_s: ClassVar[float] = 60.0
    """Time limit within which the reward must return; a later value is a fault of the run."""
    longest_block_s: ClassVar[float] = 1.0
    """Time for which the reward may occupy the event loop, which other desktops need."""
    desktop_config: ClassVar[DesktopConfig] = _SIMULATED
    """Section `desktop` of the configuration."""
    actions: ClassVar[Sequence[Action]] = (Action(ActionKind.TYPE, text="amber"), Action(ActionKind.FINISHED))
    """Actions of the episode. They are not executed: `prepare` makes the end state."""

    def task(self) -> Task:
        """Return the task of the episode; by default the first of the provider's suite, or of deskrl's."""
        return load_tasks(select_provider(self.desktop_config).provider.task_suite)[0]

    async def prepare(self, desktop: Desktop) -> None:
        """Bring the desktop, on which the task was set up, to the end state that is judged."""

    @pytest.fixture(scope="class")
    @classmethod
    def term(cls) -> RewardTerm:
        """Reward of this class, of which all tests use the same instance."""
        config = RewardTermConfig(kind=cls.kind, options=dict(cls.options), timeout_s=cls.timeout_s)
        return RewardTerm("suite", config, cls.timeout_s)

    @pytest.fixture(scope="class")
    @classmethod
    def ended(cls, term: RewardTerm) -> Iterator[EndedDesktop]:
        """Desktop in the end state that the tests of this class share."""
        suite = cls()
        with tempfile.TemporaryDirectory(prefix="deskrl-") as folder:
            desktop = make_desktop(suite.desktop_config, "suite", Path(folder) / "desktops")
            ended = EndedDesktop(desktop, suite.task(), suite.desktop_config)
            try:
                ended.start(suite.prepare, term.needs_session)
                yield ended
            finally:
                ended.close()

    def test_the_value_is_a_number_from_0_to_1(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """Any other value is a fault of the run."""
        ended.judge(term.score, self.actions, self.terms)

    def test_an_episode_without_actions_has_a_value(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """The first output of a policy may be no valid action."""
        ended.judge(term.score, (), self.terms)

    def test_the_same_end_state_has_the_same_value(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """Members of a group are compared, so that noise of the reward becomes noise of the gradient."""
        first, second = (ended.judge(term.score, self.actions, self.terms) for _ in range(2))
        assert first.value == second.value

    def test_episodes_are_judged_at_the_same_time(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """One instance judges the episodes of all desktops of an actor."""

        async def score_together(episode: EndedEpisode) -> list[Score]:
            return await asyncio.gather(*(term.score(episode) for _ in range(4)))

        assert len({score.value for score in ended.judge(score_together, self.actions, self.terms)}) == 1

    def test_the_reward_does_not_block_the_event_loop(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """An actor runs all its desktops in one event loop; a plain function runs in a thread."""

        async def longest_gap_s(episode: EndedEpisode) -> float:
            scoring = asyncio.ensure_future(term.score(episode))
            longest_s, before_s = 0.0, _time_without_delay_s()
            while not scoring.done():
                await asyncio.wait({scoring}, timeout=_POLL_S)
                now_s = _time_without_delay_s()
                longest_s, before_s = max(longest_s, now_s - before_s), now_s
            scoring.result()
            return longest_s

        assert ended.judge(longest_gap_s, self.actions, self.terms) < self.longest_block_s

    def test_the_reward_does_not_change_files_of_the_desktop(self, term: RewardTerm, ended: EndedDesktop) -> None:
        """Other terms judge the same files."""

        async def files_before_and_after(episode: EndedEpisode) -> tuple[str, str]:
            before = await _list_files(episode.desktop)
            await term.score(episode)
            return before, await _list_files(episode.desktop)

        before, after = ended.judge(files_before_and_after, self.actions, self.terms)
        assert before == after


def _time_without_delay_s() -> float:
    """Return a time in seconds that stands still while this thread waits for a processor, as on a busy machine."""
    delay_ns = int(_SCHEDULING.read_text(encoding="ascii").split()[1])
    return time.monotonic() - delay_ns / 1e9


async def _list_files(desktop: DesktopHandle) -> str:
    """Return path, size, time of change and mode of all files; empty for a desktop without commands."""
    try:
        return (await desktop.execute(_LIST_FILES)).stdout
    except UnsupportedOperation:
        return ""
