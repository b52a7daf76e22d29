"""A server of the package openenv: its environment keeps the contract of desktops, and the double answers as it does.

The package is installed into an environment of its own, which needs a package index.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from openenv_kit import ACTIONS, MAX_SESSIONS, openenv_server
from ports_kit import free_port

from deskrl.testing.desktops import DesktopSuite

SERVER = Path(__file__).parents[1] / "kit" / "openenv_server.py"
PORT = free_port()
ADDRESS = f"http://127.0.0.1:{PORT}"
MESSAGES: list[dict[str, Any]] = [
    {"type": "state"},
    {"type": "reset", "data": {"seed": 3}},
    {"type": "reset", "data": {"seed": 3, "quarter": 2}},
    {"type": "step", "data": {"x": 40, "y": 40}},
    {"type": "step", "data": {"x": 10, "y": 40}},
    {"type": "step", "data": {"x": 0, "y": 0, "label": "much too long"}},
    {"type": "step", "data": {"x": 0, "y": 0, "label": "bug"}},
    {"type": "reset", "data": {"seed": 4}},
]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Server of the package openenv."""
    folder = tmp_path_factory.mktemp("openenv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "openenv>=0.10"]
    installed = subprocess.run(pip, check=False, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"openenv cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    process = subprocess.Popen([folder / "bin" / "python", SERVER, str(PORT), str(MAX_SESSIONS)])
    while not is_listening(PORT):
        assert process.poll() is None, "the server did not start"
        time.sleep(0.1)
    yield
    process.terminate()
    process.wait()


class TestOpenEnvServer(DesktopSuite):
    provider = "openenv"
    options: ClassVar[dict[str, Any]] = {"address": ADDRESS, "actions": ACTIONS, "instruction_key": "mission"}


def test_the_double_answers_as_the_server_does() -> None:
    with openenv_server() as double:
        assert asyncio.run(answers(double.address)) == asyncio.run(answers(ADDRESS))


async def answers(address: str) -> list[Any]:
    """Return the replies to all messages without details of errors; then what one session too many is told."""
    async with aiohttp.ClientSession() as session:
        first, *others = [await session.ws_connect(f"{address}/ws") for _ in range(MAX_SESSIONS + 1)]
        replies = [await others[-1].receive_json()]
        for message in MESSAGES:
            await first.send_json(message)
            replies.append(await first.receive_json())
        for other in others:
            await other.close()
        async with session.get(f"{address}/schema") as response:
            schema = await response.json()
    fields = {part: sorted(schema[part]["properties"]) for part in ("action", "observation")}
    return [*map(without_details, replies), fields, sorted(schema["action"]["required"])]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def without_details(reply: dict[str, Any]) -> Any:
    return (reply["type"], reply["data"]["code"]) if reply["type"] == "error" else json.dumps(reply, sort_keys=True)
