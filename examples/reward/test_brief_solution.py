"""The reward `BriefSolution`: its contract, and rollouts of a scripted solution on a real desktop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.policies import ScriptedPolicy
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.episode import Episode
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig
from deskrl.core.reward_evidence import reward_terms
from deskrl.proto.v1 import rollout_pb2
from deskrl.testing.rewards import RewardSuite

KIND = "brief_solution:BriefSolution"
OPTIONS: dict[str, Any] = {"num_actions": 3, "path": "~/notes.txt"}


@pytest.fixture(scope="class", autouse=True)
def importable() -> Any:
    """Make the example importable, as from the folder in which `deskrl` is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


pytestmark = pytest.mark.skipif(bool(missing_packages()), reason="the packages of embedded desktops are missing")


class TestBriefSolution(RewardSuite):
    kind: ClassVar[str] = KIND
    options: ClassVar[dict[str, Any]] = OPTIONS
    desktop_config: ClassVar[DesktopConfig] = DesktopConfig()

    async def prepare(self, desktop: Desktop) -> None:
        await desktop.write_file("~/notes.txt", b"harbour")


class NoSink:
    """Discards screenshots and steps."""

    def add_image(self, image: Any) -> None: ...

    def add_step(self, step: Any) -> None: ...


def test_a_rollout_on_a_real_desktop_is_rewarded_by_the_example(tmp_path: Path) -> None:
    terms = {"task": {"weight": 0.0}, "brief": {"kind": KIND, "options": {**OPTIONS, "num_actions": 2}}}
    config = RunConfig(reward={"terms": terms})
    (task,) = load_tasks(ids=["write-a-word"])
    rollout = rollout_pb2.Rollout(episode_id="example", task_json=task.data, seed=1, max_steps=5)

    async def run() -> rollout_pb2.EpisodeResult:
        desktop = make_desktop(config.desktop, "example", tmp_path)
        try:
            await desktop.reset()
            policy = ScriptedPolicy(task)
            reward = make_reward(config)
            episode = Episode(
                desktop,
                task,
                rollout,
                Agent(config.agent).start_conversation,
                policy,
                NoSink(),
                config.desktop,
                lambda state: None,
                reward=reward,
            )
            return await episode.run()
        finally:
            await desktop.close()

    result = asyncio.run(run())
    values = reward_terms(result.evidence_json)
    assert values == {"task": 1.0, "brief": pytest.approx(2 / 3 * 0.8)}
    assert result.reward == pytest.approx(values["brief"])
    assert json.loads(result.evidence_json)["evidence"]["brief"]["quality"] == 0.8
