"""Job whose actors join, leave and are killed: real replay service and actors with simulated desktops."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from replay_kit import ReplayProcess, replay_config

from deskrl.actor.tasks.task_schema import SIMULATED_SUITE, load_tasks
from deskrl.core import rpc
from deskrl.core.config import DesktopConfig, SimulatedConfig
from deskrl.proto.v1 import replay_pb2, rollout_pb2

QUEUE = "demo"
ROLLOUTS = 4
_TIMEOUT_S = 240.0
_DRAIN_S = 30.0


class ElasticJob:
    """Replay service with a variable number of actors.

    Args:
        runs: directory of runs.
        desktops_per_actor: desktops of each actor.
    """

    def __init__(self, runs: Path, desktops_per_actor: int = 2) -> None:
        # Resets and actions take most of an episode, so an actor that is killed usually holds leases.
        simulated = SimulatedConfig(time_scale=0.01, hang_rate=0.0, reset_median_s=5.0, action_median_s=30.0)
        desktop = DesktopConfig(provider="simulated", width=168, height=112, simulated=simulated)
        config = replay_config(runs, rollouts=ROLLOUTS, lease_ttl_s=3.0)
        actor = config.actor.model_copy(update={"desktops_per_actor": desktops_per_actor})
        self.replay = ReplayProcess(config.model_copy(update={"desktop": desktop, "actor": actor}))
        self.client = self.replay.client()
        self.actors: list[subprocess.Popen[bytes]] = []
        self._run_dir = config.run_dir
        self._num_groups = 0
        self._was_killed = False
        self._num_started = 0

    def plan(self, num_groups: int) -> None:
        """Plan further groups of rollouts."""
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
        """Start or terminate actors until `num_actors` run; assert that terminated actors exit with status 0."""
        while len(self.actors) < num_actors:
            command = [sys.executable, "-m", "deskrl.cli.main", "actor", str(self._run_dir / "config.json")]
            with open(self._run_dir / f"actor-{self._num_started}.log", "wb") as log:
                self.actors.append(subprocess.Popen([*command, "--unnumbered"], stdout=log, stderr=log))
            self._num_started += 1
        surplus, self.actors = self.actors[num_actors:], self.actors[:num_actors]
        for actor in surplus:
            actor.terminate()
        assert [actor.wait(_DRAIN_S) for actor in surplus] == [0] * len(surplus)

    def kill(self, num_actors: int) -> None:
        """Kill the actors that were started first (SIGKILL)."""
        self._was_killed = True
        killed, self.actors = self.actors[:num_actors], self.actors[num_actors:]
        for actor in killed:
            actor.kill()
            actor.wait()

    def status(self) -> replay_pb2.QueueStatus:
        """Return the status of the queue."""
        return self.client.queue_status(QUEUE)

    def wait_until_all_are_busy(self) -> None:
        """Plan groups until three quarters of all desktops have a lease, which requires all actors to be connected."""
        num_busy = 3 * self.replay.config.actor.desktops_per_actor * len(self.actors) // 4
        self.plan(num_busy)

        def all_are_busy() -> bool:
            status = self.status()
            if status.num_planned - status.num_finished < 2 * num_busy:
                self.plan(num_busy)
            return status.num_leased >= num_busy

        self._wait(all_are_busy)

    def wait_for_finished(self, num: int) -> None:
        """Wait until `num` more episodes have finished; enough rollouts must be planned."""
        goal = self.status().num_finished + num
        self._wait(lambda: self.status().num_finished >= goal)

    def check(self) -> None:
        """Assert that every planned rollout finished exactly once, without faults, and that replay never exited."""
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
        assert [actor.poll() for actor in self.actors] == [None] * len(self.actors), (
            "actors that were neither terminated nor killed must still run"
        )

    def close(self) -> None:
        """Kill the actors and stop replay."""
        self.kill(len(self.actors))
        self.replay.close()

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert all(actor.poll() is None for actor in self.actors), f"an actor exited; logs in {self._run_dir}"
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.02)
