"""Peer of `replay_store.py`: episodes of the same size are written to a dm-reverb server, and read back.

Runs under an environment of its own, which has dm-reverb but not deskrl. A server is started in a child process. For
each line on the standard input, one turn is measured, and one JSON line is printed:

    {"write_s": …, "read_s": …, "write_server_s": …, "read_server_s": …}

The last two are processor seconds of the server.

    python tests/bench/reverb_peer.py --episodes 32 --actors 4 --steps 15 --shot-bytes 200000 --payload-bytes 6500
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import reverb

TABLE = "episodes"
_SERVER = """
import sys
import reverb
table = reverb.Table.queue({table!r}, max_size=100_000)
server = reverb.Server([table], port=None)
print(server.port, flush=True)
sys.stdin.read()
"""
"""Program of the server; its standard input is closed to end it."""

Episode = list[dict[str, Any]]
"""Arrays of each step."""


class Server:
    """Reverb server in a child process, with a queue of episodes in memory."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _SERVER.format(table=TABLE)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def processor_s(self) -> float:
        """Return the processor seconds that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_episode(options: argparse.Namespace) -> Episode:
    """Return an episode with incompressible screenshots."""
    sizes = {"screenshot": options.shot_bytes, "payload": options.payload_bytes}
    return [
        {name: np.frombuffer(os.urandom(num_bytes), np.uint8) for name, num_bytes in sizes.items()}
        for _ in range(options.steps)
    ]


def write(client: Any, waiting: list[Episode]) -> None:
    """Insert episodes until none is left, each as one item, and wait until the server has confirmed them."""
    while waiting:
        episode = waiting.pop()
        with client.trajectory_writer(num_keep_alive_refs=len(episode)) as writer:
            for step in episode:
                writer.append(step)
            whole = {name: column[:] for name, column in writer.history.items()}
            writer.create_item(TABLE, 1.0, whole)
            writer.flush()


def read(client: Any, num_episodes: int) -> int:
    """Sample each episode once, and return the size in bytes of the screenshots."""
    num_bytes = 0
    for trajectory in client.sample(TABLE, num_samples=num_episodes, emit_timesteps=False):
        num_bytes += trajectory.data[-1].nbytes  # columns are sorted by name: payload, screenshot
    return num_bytes


def turn(server: Server, client: Any, options: argparse.Namespace) -> dict[str, float]:
    """Write and read episodes; return the durations, and the processor seconds of the server."""
    waiting = [make_episode(options) for _ in range(options.episodes)]
    before_s, start_s = server.processor_s(), time.perf_counter()
    with ThreadPoolExecutor(options.actors) as actors:
        for actor in [actors.submit(write, client, waiting) for _ in range(options.actors)]:
            actor.result()
    write_s, written_s = time.perf_counter() - start_s, server.processor_s()
    start_s = time.perf_counter()
    num_bytes = read(client, options.episodes)
    read_s = time.perf_counter() - start_s
    assert num_bytes == options.episodes * options.steps * options.shot_bytes
    return {
        "write_s": write_s,
        "read_s": read_s,
        "write_server_s": written_s - before_s,
        "read_server_s": server.processor_s() - written_s,
    }


def main() -> None:
    """Measure one turn for each line of the standard input."""
    parser = argparse.ArgumentParser(description="Benchmark dm-reverb with the episodes of replay_store.py.")
    for name in ("episodes", "actors", "steps", "shot-bytes", "payload-bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    server = Server()
    try:
        client = reverb.Client(server.address)
        for _ in sys.stdin:
            print(json.dumps(turn(server, client, options)), flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
