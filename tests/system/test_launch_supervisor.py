"""The supervisor starts, restarts and stops the processes of a run, and cleans up after a killed supervisor."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ports_kit import free_port

from deskrl.core.config import dump_config, load_config
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.supervisor import Child, RoleFailed, Supervisor, describe_leftovers, temporary_folder

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """Run directory whose replay service can be started."""
    address = f"127.0.0.1:{free_port()}"
    config = load_config(SMOKE, ["--runs", str(tmp_path), "--replay.address", address])
    folder = RunDir(config.run_dir)
    folder.create()
    dump_config(config, folder.config)
    return folder


def start_replay(supervisor: Supervisor, folder: RunDir) -> int:
    return supervisor.start("replay", "replay", str(folder.config)).process.pid


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def test_a_crashed_role_is_restarted_and_counted(folder: RunDir) -> None:
    supervisor = Supervisor(folder)
    pid = start_replay(supervisor, folder)
    os.kill(pid, signal.SIGKILL)
    supervisor.children["replay"].process.wait()
    supervisor.watch()
    assert supervisor.children["replay"].process.pid != pid
    assert supervisor.num_restarts() == 1
    assert supervisor.close() == []


def test_a_role_that_rejects_its_input_is_not_restarted(folder: RunDir) -> None:
    supervisor = Supervisor(folder)
    child = supervisor.start("replay", "replay", str(folder.root / "nowhere.toml"))
    child.process.wait()
    with pytest.raises(RoleFailed, match=r"replay ended with status 2: deskrl: .*nowhere\.toml: not found"):
        supervisor.watch()
    assert supervisor.close() == []


def test_a_second_supervisor_of_a_run_is_rejected(folder: RunDir) -> None:
    supervisor = Supervisor(folder)
    with pytest.raises(UserError, match="another process is running this run"):
        Supervisor(folder)
    supervisor.close()
    Supervisor(folder).close()


def test_clients_have_exited_before_servers_are_stopped(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor(folder)
    start_replay(supervisor, folder)
    clients = [
        supervisor.start("actor-0", "actor", str(folder.config), "--index", "0").process,
        supervisor.start("learner", "learner", str(folder.config)).process,
    ]
    replay, running = supervisor.children["replay"].process, []

    def send_signal(number: int) -> None:
        running.append([client.poll() is None for client in clients])
        os.kill(replay.pid, number)

    monkeypatch.setattr(replay, "send_signal", send_signal)
    supervisor.close()
    assert running == [[False, False]]


SAVING = """
import os, pathlib, signal, sys, time
partial, num_writes = pathlib.Path(sys.argv[1], ".epoch_2.partial"), int(sys.argv[2])
weights = partial / "model.safetensors"
def save(*_):
    for size in range(num_writes):
        weights.write_bytes(bytes(size))
        time.sleep(0.05)
    time.sleep(0 if num_writes else 600)
    partial.rename(partial.with_name("epoch_2"))
    sys.exit()
partial.mkdir()
weights.touch()
if not num_writes:
    os.utime(weights, (0, 0))
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("num_writes", "exits"), [(20, True), (0, False)], ids=["writing", "hanging"])
def test_a_stopping_learner_may_finish_its_checkpoint_but_not_hang(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch, num_writes: int, exits: bool
) -> None:
    monkeypatch.setattr("deskrl.launch.supervisor.STOP_TIMEOUT_S", 0.2)
    command = [sys.executable, "-c", SAVING, str(folder.checkpoints), str(num_writes)]
    supervisor = Supervisor(folder)
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        log = open(folder.logs / "learner.log", "ab")  # noqa: SIM115 - closed when the child is stopped
        supervisor.children["learner"] = Child("learner", "learner", command, process, log=log)
        supervisor.stop(["learner"])
    assert (process.returncode == 0) is exits
    assert (folder.checkpoints / "epoch_2").exists() is exits
    assert [line["role"] for line in folder.read_metrics("stop_timeout")] == ([] if exits else ["learner"])
    supervisor.close()


def test_roles_exit_with_a_killed_supervisor_and_the_next_one_removes_leftovers(folder: RunDir) -> None:
    program = (
        "import sys, time; from pathlib import Path; from deskrl.core.run_dir import RunDir\n"
        "from deskrl.launch.supervisor import Supervisor\n"
        "supervisor = Supervisor(RunDir(Path(sys.argv[1])))\n"
        "print(supervisor.start('replay', 'replay', sys.argv[1] + '/config.json').process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(folder.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        replay_pid = int(victim.stdout.readline())
        (temporary_folder(folder) / "left").touch()
        victim.kill()
    wait_until(lambda: not psutil.pid_exists(replay_pid))
    supervisor = Supervisor(folder)
    assert supervisor.num_leftovers >= 1
    assert supervisor.close() == []


def test_leftovers_are_described(folder: RunDir) -> None:
    supervisor = Supervisor(folder)
    (supervisor.temporary / "stray").touch()
    (leftover,) = supervisor.close()
    assert leftover == f"file {supervisor.temporary / 'stray'}"
    assert describe_leftovers(folder) == []
