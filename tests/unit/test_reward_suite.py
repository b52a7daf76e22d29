"""The contract suite of rewards: the built-in evaluators and a plain function keep it, and defects break it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.rewards.reward_term import RewardTerm
from deskrl.actor.tasks.evaluators import EvaluatorError
from deskrl.core.config import RewardTermConfig
from deskrl.testing.rewards import EndedDesktop, RewardSuite

REWARDS = """
import random, time
def plain(episode): return episode.terms["task"] / 2
def too_large(episode): return 2.0
def random_value(episode): return random.random()
def needs_an_action(episode): return 1.0 if episode.actions[0] else 0.0
async def blocks(episode):
    time.sleep(0.5)
    return 1.0
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("rewards")
    (folder / "suite_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    sys.modules.pop("suite_rewards", None)


class TestEvaluators(RewardSuite):
    kind: ClassVar[str] = "evaluators"


class TestPlainFunction(RewardSuite):
    kind: ClassVar[str] = "suite_rewards:plain"


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("too_large", RewardSuite.test_the_value_is_a_number_from_0_to_1),
        ("random_value", RewardSuite.test_the_same_end_state_has_the_same_value),
        ("needs_an_action", RewardSuite.test_an_episode_without_actions_has_a_value),
        ("blocks", RewardSuite.test_the_reward_does_not_block_the_event_loop),
    ],
)
def test_the_suite_finds_a_defect(name: str, test: Callable[..., Any], tmp_path: Path) -> None:
    class Defective(RewardSuite):
        longest_block_s: ClassVar[float] = 0.4

    suite = Defective()
    term = RewardTerm("suite", RewardTermConfig(kind=f"suite_rewards:{name}"), 5.0)
    ended = EndedDesktop(make_desktop(suite.desktop_config, "d", tmp_path), suite.task(), suite.desktop_config)
    ended.start(suite.prepare, term.needs_session)
    with pytest.raises((AssertionError, EvaluatorError)):
        test(suite, term, ended)
    ended.close()
