"""The end of a session's processes: real processes of another user fork as fast as they can."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from deskrl.actor.guest.credentials import signal_user
from deskrl.actor.guest.processes import SessionProcesses, SetupPrograms, read_process
from deskrl.actor.guest.session_sandbox import SeparateUser

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")

USER_ID = 61357
FORKING = {
    "a chain": "import os\nwhile 1:\n if os.fork(): os._exit(0)",
    "two chains": "import os\nos.fork()\nwhile 1:\n if os.fork(): os._exit(0)",
    "a bomb": "import os, resource\nresource.setrlimit(resource.RLIMIT_NPROC, (100, 100))\n"
    "while 1:\n try: os.fork()\n except OSError: pass",
    "a chain in new sessions": "import os\nwhile 1:\n if os.fork(): os._exit(0)\n os.setsid()",
    "a chain of vfork": "import os\nwhile 1: os.posix_spawn('/bin/true', ['true'], {})",
    "continues what was stopped": "import os, signal\nfor _ in range(4): os.fork()\n"
    "while 1:\n try: os.kill(-1, signal.SIGCONT)\n except OSError: pass",
}
"""Python programs that never stop to start processes."""
IDLE = ["/bin/sleep", "1000"]


class UserProcesses(SessionProcesses):
    """All processes of one user, as in a session without a sandbox of its own."""

    file_user_id = None
    is_member = SeparateUser.is_member
    signal_all = SeparateUser.signal_all
    is_signalled = SeparateUser.is_signalled
    _user_id = USER_ID


@pytest.fixture
def processes() -> Iterator[SessionProcesses]:
    yield UserProcesses()
    signal_user(USER_ID, signal.SIGKILL)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program as the session's user."""
    return subprocess.Popen(command, user=USER_ID, group=USER_ID, extra_groups=())


def start_forking(name: str) -> None:
    start(["/usr/bin/python3", "-c", FORKING[name]])
    time.sleep(0.3)


@pytest.mark.parametrize("name", FORKING)
def test_programs_that_fork_without_end_are_killed_and_the_setup_lives_on(
    processes: SessionProcesses, name: str
) -> None:
    setup = start(IDLE)
    programs = SetupPrograms(processes)
    programs.remember()
    start_forking(name)
    programs.kill_others(timeout_s=30)
    time.sleep(0.1)
    assert [process.pid for process in processes.living()] == [setup.pid]
    running = read_process(setup.pid)
    assert running is not None and not running.is_stopped


@pytest.mark.parametrize("name", FORKING)
def test_the_end_of_a_session_kills_programs_that_fork_without_end(processes: SessionProcesses, name: str) -> None:
    start_forking(name)
    processes.kill_all(timeout_s=30)
    time.sleep(0.1)
    assert list(processes.living()) == []


def test_a_program_of_another_user_is_not_signalled() -> None:
    neighbour = subprocess.Popen(IDLE, user=USER_ID + 1)
    try:
        signal_user(USER_ID, signal.SIGKILL)
        assert neighbour.poll() is None
    finally:
        neighbour.kill()
        neighbour.wait()


def test_signals_leave_the_identity_of_this_thread_unchanged() -> None:
    signal_user(USER_ID, signal.SIGKILL)
    assert os.getresuid() == (0, 0, 0)
