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
from deskrl.core.running.supervisor import RoleFailed, Supervisor, describe_leftovers, temporary_folder

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
