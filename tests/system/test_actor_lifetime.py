"""Process lifecycle of a role: it drains on a signal and when its supervisor dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deskrl.core.process_lifecycle import SUPERVISOR_VARIABLE, StopEvent, supervised_environment

_ROLE = """
import sys
from deskrl.core.process_lifecycle import die_with_parent, stop_event
stop = stop_event()
die_with_parent(grace_s=0.5)
print("ready", flush=True)
stop.wait(30)
if "waits" in sys.argv:
    print("draining", flush=True)
    sys.stdin.readline()
print("drained", flush=True)
if "hangs" in sys.argv:
    import time
    time.sleep(30)
"""


def _start_role(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    role = subprocess.Popen(
        [sys.executable, "-c", _ROLE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert role.stdout is not None
    return role


def _supervisor() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_role_drains_on_a_signal_and_ignores_further_signals(number: signal.Signals) -> None:
    with _start_role("waits") as role:
        assert role.stdin is not None and role.stdout is not None and role.stdout.readline() == "ready\n"
        role.send_signal(number)
        assert role.stdout.readline() == "draining\n"
        role.send_signal(number)
        role.stdin.write("go on\n")
        role.stdin.flush()
        assert role.stdout.read() == "drained\n"
    assert role.returncode == 0


def test_a_role_drains_when_its_supervisor_is_killed() -> None:
    supervisor = _supervisor()
    with _start_role(**{SUPERVISOR_VARIABLE: str(supervisor.pid)}) as role:
        assert role.stdout is not None and role.stdout.readline() == "ready\n"
        supervisor.kill()
        supervisor.wait()
        assert role.stdout.read() == "drained\n"
    assert role.returncode == 0


def test_a_role_that_hangs_after_its_supervisor_died_is_killed() -> None:
    supervisor = _supervisor()
    with _start_role("hangs", **{SUPERVISOR_VARIABLE: str(supervisor.pid)}) as role:
        assert role.stdout is not None and role.stdout.readline() == "ready\n"
        supervisor.kill()
        supervisor.wait()
        assert role.stdout.read() == "drained\n"
    assert role.returncode == -signal.SIGKILL


def test_a_role_drains_if_its_supervisor_died_before_it_started() -> None:
    supervisor = _supervisor()
    supervisor.kill()
    supervisor.wait()
    with _start_role(**{SUPERVISOR_VARIABLE: str(supervisor.pid)}) as role:
        assert role.stdout is not None
        assert "drained\n" in role.stdout.read()
    assert role.returncode == 0


def test_a_role_that_is_not_a_child_of_its_supervisor_drains_too(tmp_path: Path) -> None:
    """The ranks of torchrun are such processes: children of a launcher that itself is a child of the supervisor."""
    launcher = textwrap.dedent(
        """
        import os, subprocess, sys
        from deskrl.core.process_lifecycle import supervised_environment
        shell = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, os.environ["ROLE"]]
        subprocess.run(shell, env={**os.environ, **supervised_environment()})
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env={**os.environ, "ROLE": _ROLE}
    ) as supervisor:
        assert supervisor.stdout is not None and supervisor.stdout.readline() == "ready\n"
        supervisor.kill()
        assert supervisor.stdout.read() == "drained\n"


def test_the_environment_names_the_calling_process_as_supervisor() -> None:
    assert supervised_environment() == {SUPERVISOR_VARIABLE: str(os.getpid())}


def test_a_signal_that_interrupts_a_wait_at_any_instruction_sets_the_event() -> None:
    program = textwrap.dedent(
        """
        import signal
        from deskrl.core.process_lifecycle import stop_event
        for index in range(500):
            stop = stop_event()
            signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + index * 1e-7)
            while not stop.wait(0):
                pass
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("waiting", ["stop.wait()", "asyncio.run(stop.wait_async())"])
def test_a_signal_that_another_thread_receives_ends_the_wait_of_the_main_thread(waiting: str) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, signal, threading, time
        from deskrl.core.process_lifecycle import stop_event
        stop = stop_event()
        def interrupt():
            time.sleep(0.1)  # until the main thread waits
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            time.sleep(3600)  # the end of a thread would wake the main thread
        threading.Thread(target=interrupt, daemon=True).start()
        {waiting}
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_coroutine_can_wait_for_the_stop_event() -> None:
    async def scenario() -> None:
        event = StopEvent()
        waiting = asyncio.create_task(event.wait_async())
        asyncio.get_running_loop().call_soon(event.set)
        await asyncio.wait_for(waiting, 5)
        await asyncio.wait_for(event.wait_async(), 5)
        assert event.is_set() and event.wait(0)

    asyncio.run(scenario())
