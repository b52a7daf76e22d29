"""A job whose actors come and go: a real replay service, real actor processes on simulated desktops, scripted episodes.

Knows how processes are started, ended and killed, and what has to be true in the end whatever was done to them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from replay_kit import ReplayProcess, replay_config

from deskrl.actor.tasks.files import SIMULATED_SUITE, load_tasks
from deskrl.core import rpc
from deskrl.core.config import DesktopConfig, SimulatedConfig
from deskrl.proto.v1 import replay_pb2, rollout_pb2

QUEUE = "demo"
ROLLOUTS = 4
_PATIENCE_S = 240.0
_DRAIN_S = 30.0


class ElasticJob:
    """Replay, and as many actors as are asked for."""

    def __init__(self, runs: Path, desktops_per_actor: int = 2) -> None:
        # Most of an episode is play, so whoever is killed holds leases.
        simulated = SimulatedConfig(time_scale=0.01, hang_share=0.0, reset_median_s=5.0, action_median_s=30.0)
        desktop = DesktopConfig(provider="simulated", width=168, height=112, simulated=simulated)
        config = replay_config(runs, rollouts=ROLLOUTS, lease_ttl_s=3.0)
        actor = config.actor.model_copy(update={"desktops_per_actor": desktops_per_actor})
        self.replay = ReplayProcess(config.model_copy(update={"desktop": desktop, "actor": actor}))
        self.client = self.replay.client()
        self.actors: list[subprocess.Popen[bytes]] = []
        self._folder = config.folder
        self._num_groups = 0
        self._was_killed = False
        self._num_started = 0

    def plan(self, num_groups: int) -> None:
        """Work for everybody."""
        (task,) = load_tasks(SIMULATED_SUITE, ("type-amber",))
        groups = [
            replay_pb2.GroupPlan(
                group_id=f"{QUEUE}/{number:06d}",
                queue=QUEUE,
                task_id=task.id,
                task_json=task.data,
                seeds=range(ROLLOUTS),
                max_steps=6,
                temperature=1.0,
                acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED,
            )
            for number in range(self._num_groups, self._num_groups + num_groups)
        ]
        self.client.replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "test"), groups=groups))
        self._num_groups += num_groups

    def scale(self, num_actors: int) -> None:
        """Start the missing, or end the surplus by SIGTERM; an actor that does not end well is told of."""
        while len(self.actors) < num_actors:
            command = [sys.executable, "-m", "deskrl.core.cli", "actor", str(self._folder / "config.json")]
            with open(self._folder / f"actor-{self._num_started}.log", "wb") as log:
                self.actors.append(subprocess.Popen([*command, "--unnumbered"], stdout=log, stderr=log))
            self._num_started += 1
        surplus, self.actors = self.actors[num_actors:], self.actors[:num_actors]
        for actor in surplus:
            actor.terminate()
        assert [actor.wait(_DRAIN_S) for actor in surplus] == [0] * len(surplus)

    def kill(self, num_actors: int) -> None:
        """kill -9, of the longest-serving."""
        self._was_killed = True
        killed, self.actors = self.actors[:num_actors], self.actors[num_actors:]
        for actor in killed:
            actor.kill()
            actor.wait()

    def status(self) -> replay_pb2.QueueStatus:
        """What has become of the work."""
        return self.client.queue_status(QUEUE)

    def wait_until_all_work(self) -> None:
        """Plan work until three in four desktops have an episode in hand, which takes that all actors are there."""
        wanted = 3 * self.replay.config.actor.desktops_per_actor * len(self.actors) // 4
        self.plan(wanted)

        def all_work() -> bool:
            status = self.status()
            if status.num_planned - status.num_finished < 2 * wanted:
                self.plan(wanted)
            return status.num_leased >= wanted

        self._wait(all_work)

    def wait_for_finished(self, num: int) -> None:
        """Until so many episodes more have ended; there has to be work for them."""
        goal = self.status().num_finished + num
        self._wait(lambda: self.status().num_finished >= goal)

    def check(self) -> None:
        """Everything planned was played, once: no episode lost, none doubled, no fault, replay the same process."""
        episodes = []
        for ordinal in range(self._num_groups):
            group = self.client.take(QUEUE, QUEUE, ordinal, wait_s=15.0)
            while group is None:
                group = self.client.take(QUEUE, QUEUE, ordinal, wait_s=15.0)
            assert len(group.episodes) == ROLLOUTS and group.num_faulted == 0
            episodes += group.episodes
        assert max(Counter(episode.episode_id for episode in episodes).values()) == 1
        assert {episode.result.reward for episode in episodes} == {1.0}
        status = self.status()
        assert status.num_planned == status.num_finished == ROLLOUTS * self._num_groups
        assert status.num_faulted == status.num_leased == 0
        assert (self.client.status().num_leases_expired > 0) == self._was_killed
        assert self.replay.process.poll() is None
        assert [actor.poll() for actor in self.actors] == [None] * len(self.actors), "who was left alone still runs"

    def close(self) -> None:
        """End everything."""
        self.kill(len(self.actors))
        self.replay.close()

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.02)
