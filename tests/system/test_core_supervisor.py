"""A supervisor owns its run's processes, whatever becomes of it."""

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
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.supervisor import Child, RoleFailed, Supervisor, describe_leftovers, temporary_folder

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder whose replay service can be started."""
    address = f"127.0.0.1:{free_port()}"
    config = load_config(SMOKE, ["--runs", str(tmp_path), "--replay.address", address])
    folder = RunFolder(config.folder)
    folder.create()
    dump_config(config, folder.config)
    return folder


def start_replay(supervisor: Supervisor, folder: RunFolder) -> int:
    return supervisor.start("replay", "replay", str(folder.config)).process.pid


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_a_crashed_role_is_started_again_and_counted(folder: RunFolder) -> None:
    supervisor = Supervisor(folder)
    pid = start_replay(supervisor, folder)
    os.kill(pid, signal.SIGKILL)
    supervisor.children["replay"].process.wait()
    supervisor.watch()
    assert supervisor.children["replay"].process.pid != pid
    assert supervisor.num_restarts() == 1
    assert supervisor.close() == []


def test_a_role_that_refuses_its_input_is_not_started_again(folder: RunFolder) -> None:
    supervisor = Supervisor(folder)
    child = supervisor.start("replay", "replay", str(folder.root / "nowhere.toml"))
    child.process.wait()
    with pytest.raises(RoleFailed, match=r"replay ended with status 2: deskrl: .*nowhere\.toml: no such file"):
        supervisor.watch()
    assert supervisor.close() == []


def test_one_run_has_one_supervisor(folder: RunFolder) -> None:
    supervisor = Supervisor(folder)
    with pytest.raises(UserError, match="is being run by another process"):
        Supervisor(folder)
    supervisor.close()
    Supervisor(folder).close()


def test_whoever_calls_others_has_ended_when_those_are_asked_to(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(folder)
    start_replay(supervisor, folder)
    callers = [
        supervisor.start("actor-0", "actor", str(folder.config), "--index", "0").process,
        supervisor.start("learner", "learner", str(folder.config)).process,
    ]
    replay, running = supervisor.children["replay"].process, []

    def send_signal(number: int) -> None:
        running.append([caller.poll() is None for caller in callers])
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


@pytest.mark.parametrize(("num_writes", "ends_by_itself"), [(20, True), (0, False)], ids=["it writes", "it hangs"])
def test_a_learner_that_is_told_to_end_may_write_its_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, num_writes: int, ends_by_itself: bool
) -> None:
    monkeypatch.setattr("deskrl.core.running.supervisor.STOP_TIMEOUT_S", 0.2)
    command = [sys.executable, "-c", SAVING, str(folder.checkpoints), str(num_writes)]
    supervisor = Supervisor(folder)
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        log = open(folder.logs / "learner.log", "ab")  # noqa: SIM115 - closed when the child is stopped
        supervisor.children["learner"] = Child("learner", "learner", command, process, log=log)
        supervisor.stop(["learner"])
    assert (process.returncode == 0) is ends_by_itself
    assert (folder.checkpoints / "epoch_2").exists() is ends_by_itself
    assert [line["role"] for line in folder.read_metrics("stop_timeout")] == ([] if ends_by_itself else ["learner"])
    supervisor.close()


def test_roles_end_with_a_supervisor_that_was_killed_and_the_next_one_removes_the_rest(folder: RunFolder) -> None:
    program = (
        "import sys, time; from pathlib import Path; from deskrl.core.runfolder import RunFolder\n"
        "from deskrl.core.running.supervisor import Supervisor\n"
        "supervisor = Supervisor(RunFolder(Path(sys.argv[1])))\n"
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


def test_what_is_left_is_named(folder: RunFolder) -> None:
    supervisor = Supervisor(folder)
    (supervisor.temporary / "stray").touch()
    (leftover,) = supervisor.close()
    assert leftover == f"file {supervisor.temporary / 'stray'}"
    assert describe_leftovers(folder) == []
