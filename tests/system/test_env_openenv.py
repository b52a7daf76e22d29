"""OpenEnv server and client: an episode over the network, sessions with desktops of their own, errors and faults."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.orphan_cleanup import find_sandbox_processes
from deskrl.actor.main import desktops_dir
from deskrl.env.desktop_env import env_config
from deskrl.env.desktop_fault import DesktopFault

pytest.importorskip("openenv", reason="the package openenv is not installed")
pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

TASK = "make-a-folder"
SOLUTION = [
    {"kind": "type", "text": "mkdir amber"},
    {"kind": "hotkey", "keys": ["enter"]},
    {"response": "Thought: It is done.\nAction: finished()"},
]


@contextmanager
def serving(config: Any) -> Iterator[str]:
    """Run the server in a thread and yield its address."""
    import uvicorn

    from deskrl.env.openenv_server import make_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(make_app(config), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def action(values: dict[str, Any]) -> Any:
    from deskrl.env.openenv_messages import DesktopAction

    return DesktopAction(**values)


def connect(address: str) -> Any:
    from deskrl.env.openenv_client import DesktopClient

    return DesktopClient(base_url=address).sync()


def test_tasks_are_played_through_the_server_and_faults_reach_the_client(tmp_path: Path) -> None:
    config = env_config({"runs": str(tmp_path), "tasks": {"ids": [TASK]}, "desktop": {"num_envs": 2}})
    with serving(config) as address, connect(address) as client:
        first = client.reset(seed=1, task=TASK).observation
        assert first.image().size == (1280, 720) and first.instruction == "Make a folder called amber in your home."
        results = [client.step(action(values)) for values in SOLUTION]
        assert [(result.reward, result.done) for result in results] == [(0.0, False), (0.0, False), (1.0, True)]
        assert results[-1].observation.termination == "finished" and client.state().step_count == 3

        with connect(address) as other:  # a session with a desktop of its own
            other.reset(seed=1, task=TASK)
            assert other.step(action({"kind": "finished"})).reward == 0.0

        with pytest.raises(RuntimeError, match="there is no task 'none'"):
            client.reset(task="none")
        with pytest.raises(RuntimeError, match="reset has no option 'tasks'"):
            client.reset(tasks=TASK)
        client.reset(seed=1, task=TASK)
        with pytest.raises(RuntimeError, match="give either kind or response"):
            client.step(action({}))
        client.step(action(SOLUTION[0]))
        for folder in desktops_dir(config).iterdir():
            for pid in find_sandbox_processes(folder):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(DesktopFault) as caught:
            client.step(action(SOLUTION[1]))
        assert caught.value.kind == "desktop_lost"
        client.reset(seed=1, task=TASK)
        assert [client.step(action(values)).reward for values in SOLUTION][-1] == 1.0


def test_a_configuration_that_cannot_run_ends_the_server_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deskrl.env.openenv_server import main

    file = tmp_path / "run.toml"
    file.write_text('[tasks]\nids = ["none"]\n')
    assert main([str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "none" in lines[0]
