"""deploy/slurm starts, scales, requeues, drains and stops a run with certificates, on Debian's Slurm with one node.

The jobs of learner and inference are held (`--hold`), so that no GPU is needed.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ports_kit import free_port
from replay_kit import ReplayClient
from slurm_kit import slurm, slurm_unavailable_reason

from deskrl.actor.tasks.task_schema import SIMULATED_SUITE, load_tasks
from deskrl.core import rpc
from deskrl.core.config import load_config
from deskrl.launch.certificates import make_certificates
from deskrl.proto.v1 import replay_pb2, rollout_pb2

LAUNCH = Path(__file__).parents[2] / "deploy" / "slurm" / "launch.sh"
pytestmark = pytest.mark.skipif(bool(slurm_unavailable_reason()), reason=f"no Slurm: {slurm_unavailable_reason()}")
_TIMEOUT_S = 120.0


class Job:
    """Run under Slurm, controlled from the login node.

    Args:
        root: folder for the configuration, certificates and the run directory.
        environment: environment for Slurm's commands.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._environment = environment | {"SBATCH_LEARNER": "--hold", "SBATCH_INFERENCE": "--hold"}
        make_certificates(root / "certificates", [socket.gethostname()], 1)
        (root / "model").mkdir()
        self.config = root / "run.toml"
        self._text = f"""
            name = "slurm"
            runs = "{root / "runs"}"
            model.path = "{root / "model"}"
            security.certificates_dir = "{root / "certificates"}"
            replay.address = "127.0.0.1:{free_port()}"
            actor.desktops_per_actor = 1
            desktop.provider = "simulated"
            desktop.simulated.time_scale = 0.01
            desktop.num_envs = NUM
        """
        self.set_num_envs(2)

    def set_num_envs(self, num_envs: int) -> None:
        """Set `desktop.num_envs` in the configuration file."""
        self.config.write_text(self._text.replace("NUM", str(num_envs)))

    def launch(self, command: str) -> str:
        """Run `launch.sh COMMAND run.toml` and return its output."""
        done = subprocess.run(
            ["bash", LAUNCH, command, self.config], capture_output=True, text=True, env=self._environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def running(self, role: str) -> set[str]:
        """Return the array indices of the running jobs of a role."""
        name = f"--name=deskrl-slurm-{role}"
        result = subprocess.run(
            ["squeue", "--noheader", "--array", "--states=RUNNING", "--format=%K", name],
            capture_output=True,
            text=True,
            env=self._environment,
        )
        return set(result.stdout.split())

    def control(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output."""
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job_ids(self, role: str) -> list[str]:
        """Return the ids of the jobs of a role, in the order of their array indices."""
        listed = self.control("squeue", "--noheader", "--array", "--format=%F_%K", f"--name=deskrl-slurm-{role}")
        return sorted(job_id.removesuffix("_N/A") for job_id in listed.split())

    def num_requeues(self, job_id: str) -> int:
        """Return how many times a job was requeued."""
        return int(self.control("scontrol", "show", "job", job_id).split("Restarts=")[1].split()[0])

    def logs(self) -> str:
        """Return the logs of all roles."""
        folder = load_config(self.config).run_dir / "logs"
        return "".join(f"{path.name}: {path.read_text()}" for path in folder.glob("*.log"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)


def plan(client: ReplayClient, num_groups: int) -> None:
    """Plan groups of four demonstrations, which need no inference."""
    (task,) = load_tasks(SIMULATED_SUITE, ("type-amber",))
    groups = [
        replay_pb2.GroupPlan(
            group_id=f"demo/{number}",
            queue="demo",
            task_id=task.id,
            task_json=task.data,
            seeds=range(4),
            max_steps=6,
            temperature=1.0,
            acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED,
        )
        for number in range(num_groups)
    ]
    client.replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "test"), groups=groups))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with slurm(tmp_path / "slurm") as environment:
        job = Job(tmp_path, environment)
        yield job
        job.launch("stop")
    rpc.set_identity(None)


def test_a_run_is_started_scaled_drained_and_stopped(job: Job, tmp_path: Path) -> None:
    job.launch("start")
    job.wait_for(lambda: job.running("actor") == {"0", "1"})
    rpc.load_own_identity("operator", tmp_path / "certificates")
    address_file = load_config(job.config).run_dir / "addresses" / "replay"
    job.wait_for(address_file.exists)
    address = address_file.read_text().strip()
    assert address.startswith(socket.gethostname())
    job.wait_for(lambda: rpc.check_health(address))
    with closing(ReplayClient(address)) as client:
        job.wait_for(lambda: client.status().num_actors == 2)
        job.set_num_envs(4)
        assert "2 submitted, 0 draining" in job.launch("scale")
        job.wait_for(lambda: job.running("actor") == {"0", "1", "2", "3"} and client.status().num_actors == 4)
        job.set_num_envs(1)
        assert "0 submitted, 3 draining" in job.launch("scale")
        job.wait_for(lambda: job.running("actor") == {"0"})
        job.launch("drain")
        job.wait_for(lambda: job.running("actor") == set())
        assert job.running("replay"), "draining the actors must not stop replay"
    job.launch("stop")
    job.wait_for(lambda: job.running("replay") == set())
    assert "Traceback" not in job.logs()


def test_requeued_jobs_resume_their_roles_and_no_episode_is_lost_or_repeated(job: Job, tmp_path: Path) -> None:
    job.launch("start")
    rpc.load_own_identity("operator", tmp_path / "certificates")
    address_file = load_config(job.config).run_dir / "addresses" / "replay"
    job.wait_for(address_file.exists)
    address = address_file.read_text().strip()
    job.wait_for(lambda: rpc.check_health(address))
    (replay,), actors = job.job_ids("replay"), job.job_ids("actor")
    with closing(ReplayClient(address)) as client:
        plan(client, num_groups=10)
        job.wait_for(lambda: client.queue_status("demo").num_finished >= 1)
        job.control("scontrol", "requeue", actors[0])  # as a preemption does
        job.control("scancel", "--signal=USR1", "--batch", actors[1])  # as --signal does before the time limit
        job.wait_for(lambda: [job.num_requeues(actor) for actor in actors] == [1, 1])
        assert "2 of actor, 0 submitted, 0 draining" in job.launch("scale"), "a requeued job is not submitted again"
    job.control("scontrol", "requeue", replay)
    job.wait_for(lambda: job.running("replay") != set() and rpc.check_health(address))
    assert job.num_requeues(replay) == 1 and address_file.read_text().strip() == address
    with closing(ReplayClient(address)) as client:
        job.wait_for(lambda: client.queue_status("demo").num_finished == 40)
        queue = client.queue_status("demo")
        assert (queue.num_planned, queue.num_leased, queue.num_faulted) == (40, 0, 0)
        episodes = [episode.episode_id for episode in client.episodes(envelope_only=True)]
        assert len(episodes) == len(set(episodes)) == 40
    assert "Traceback" not in job.logs()
