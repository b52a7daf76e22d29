"""deploy/slurm/role.sh passes signals on, requeues its job before the time limit, and ends a run that has finished."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROLE = Path(__file__).parents[2] / "deploy" / "slurm" / "role.sh"
DESKRL = """
if [ "$1" = size ]; then
    printf '%s\\n' "folder=$FOLDER" name=mine num_nodes=1 replay_port=7411 inference_port=7421
    exit
fi
"""
WAITS = "trap 'exit {status}' TERM; echo ready; while :; do sleep 0.05; done"


class Job:
    """Job of one role, with scripts in place of deskrl and of Slurm's commands.

    Args:
        folder: folder for the scripts and the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        (self.run_dir / "addresses").mkdir(parents=True)
        (self.run_dir / "addresses" / "replay").write_text("node:7411\n")
        self._programs = folder / "programs"
        self._programs.mkdir()
        self._calls = folder / "calls"
        self._calls.touch()
        for command in ("scancel", "scontrol"):
            self._write(command, f'echo {command} "$@" >>{self._calls}')

    def start(self, role: str, program: str, **environment: str) -> subprocess.Popen[str]:
        """Start the job, whose role runs a shell program."""
        self._write("deskrl", DESKRL + program)
        environment |= {"PATH": f"{self._programs}:{os.environ['PATH']}", "FOLDER": str(self.run_dir)}
        environment["SLURM_JOB_ID"] = "7"
        if role in ("actor", "inference"):
            environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        pipe = subprocess.PIPE
        command = ["bash", str(ROLE), role, "run.toml"]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True)

    def calls(self) -> list[str]:
        """Return the calls of Slurm's commands."""
        return self._calls.read_text().splitlines()

    def _write(self, name: str, program: str) -> None:
        (self._programs / name).write_text(f"#!/bin/sh\n{program}\n")
        (self._programs / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def signalled(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Send a signal to a job whose role is running, and return the job's exit status."""
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_a_learner_that_has_finished_ends_the_other_jobs_of_the_run(job: Job) -> None:
    process = job.start("learner", "exit 0")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert job.calls() == [f"scancel --me --name=deskrl-mine-{role}" for role in ("actor", "inference", "replay")]


@pytest.mark.parametrize("status", [2, 143])
def test_a_learner_that_has_not_finished_leaves_the_other_jobs_alone(job: Job, status: int) -> None:
    process = job.start("learner", f"exit {status}")
    process.communicate(timeout=60)
    assert (process.returncode, job.calls()) == (status, [])


@pytest.mark.parametrize(("role", "status"), [("learner", 143), ("replay", 0), ("inference", 0), ("actor", 0)])
def test_a_role_that_is_ended_by_slurm_is_not_requeued_by_its_script(job: Job, role: str, status: int) -> None:
    process = job.start(role, WAITS.format(status=status))
    assert (signalled(process, signal.SIGTERM), job.calls()) == (status, [])


@pytest.mark.parametrize(("role", "status"), [("learner", 143), ("replay", 0), ("inference", 0), ("actor", 0)])
def test_a_job_near_its_time_limit_ends_its_role_and_is_requeued(job: Job, role: str, status: int) -> None:
    process = job.start(role, WAITS.format(status=status))
    requeued = "7_0" if role in ("actor", "inference") else "7"  # 7 would be all elements of the array
    assert (signalled(process, signal.SIGUSR1), job.calls()) == (status, [f"scontrol requeue {requeued}"])


def test_a_learner_that_finishes_at_its_time_limit_ends_the_run_and_is_not_requeued(job: Job) -> None:
    process = job.start("learner", WAITS.format(status=0))
    signalled(process, signal.SIGUSR1)
    assert [call.split()[0] for call in job.calls()] == ["scancel"] * 3


def test_a_role_whose_input_is_invalid_is_not_requeued(job: Job) -> None:
    process = job.start("actor", WAITS.format(status=2))
    assert (signalled(process, signal.SIGUSR1), job.calls()) == (2, [])


@pytest.mark.parametrize("role", ["learner", "replay", "inference", "actor"])
def test_a_role_that_crashes_is_started_again(job: Job, role: str) -> None:
    process = job.start(role, f"[ -e {job.run_dir}/crashed ] && exit 2; touch {job.run_dir}/crashed; kill -KILL $$")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.calls()) == (2, [])
    assert output == f"role.sh: {role} ended with status 137 and is started again\n"


def test_a_role_that_crashes_when_it_is_to_end_is_not_started_again(job: Job) -> None:
    process = job.start("actor", WAITS.format(status=1))
    assert (signalled(process, signal.SIGTERM), job.calls()) == (1, [])


def test_the_replay_job_is_requeued_to_the_node_that_has_the_store(job: Job) -> None:
    (job.run_dir / "replay").symlink_to("/local/store")
    (job.run_dir / "replay_node").write_text("other\n")
    process = job.start("replay", "echo started", SLURMD_NODENAME="here")
    output, _ = process.communicate(timeout=60)
    assert "is on other, not on here" in output and "started" not in output
    assert job.calls() == ["scontrol requeue 7", "scontrol update JobId=7 ReqNodeList=other"]
    assert (job.run_dir / "replay_node").read_text() == "other\n"
