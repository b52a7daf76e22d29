"""A run whose actors reach the services only through an SSH tunnel recovers from failures of the tunnel."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_kit.checks import find_violations
from chaos_kit.disk import disk_unavailable_reason
from chaos_kit.job import ACTORS, ChaosJob, build_model
from tunnel_kit import TUNNEL_IS_DOWN, TUNNEL_IS_OPEN, Tunnel, other_machine, tunnel_unavailable_reason

from deskrl.core import rpc
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc

NUM_UPDATES = 12
TIMEOUT_S = 180.0

pytestmark = [
    pytest.mark.skipif(bool(tunnel_unavailable_reason()), reason=f"no tunnel: {tunnel_unavailable_reason()}"),
    pytest.mark.skipif(bool(disk_unavailable_reason()), reason=f"no private disk: {disk_unavailable_reason()}"),
]


def wait_until(condition: Callable[[], bool], description: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting until {description}"
        time.sleep(0.05)


def num_leased(job: ChaosJob) -> int:
    """Return the number of leased rollouts, as reported by replay."""
    rpc.load_own_identity("operator", job.config.security.certificates_dir)
    try:
        with rpc.connect_sync(job.config.replay.address) as channel:
            stub = replay_pb2_grpc.ReplayServiceStub(channel)
            status = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=20.0)
            return sum(queue.num_leased for queue in status.queues)
    finally:
        rpc.set_identity(None)


def test_a_run_with_actors_behind_a_tunnel_recovers_from_failures_of_the_tunnel(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    with other_machine() as machine:
        job = ChaosJob(tmp_path, "tunnel", NUM_UPDATES, 1, model, actor_prefix=machine.prefix)
        try:
            ports = [int(job.links[link].address.rpartition(":")[2]) for link in ("actor~replay", "actor~inference")]
            wait_until(
                lambda: all((job.folder.logs / f"{name}.log").stat().st_size for name in ACTORS),
                "the actors have started",
            )
            assert job.acknowledged == []
            tunnel = Tunnel(machine, job.client_config("actor"), tmp_path, ports)
            try:
                job.wait_until_running()

                machine.unplug()
                wait_until(lambda: tunnel.count(TUNNEL_IS_DOWN) > 0, "the tunnel reports the dead connection")
                wait_until(lambda: num_leased(job) == 0, "the leases of the unreachable actors have expired")
                before = len(job.acknowledged)
                machine.plug()
                wait_until(lambda: tunnel.count(TUNNEL_IS_OPEN) == 2, "the tunnel has reconnected")
                wait_until(lambda: len(job.acknowledged) > before, "further episodes are acknowledged")

                os.kill(tunnel.ssh_pid, signal.SIGKILL)
                wait_until(
                    lambda: tunnel.count(TUNNEL_IS_OPEN) == 3,
                    "the tunnel has reconnected after its SSH client was killed",
                )
                assert not job.is_finished
                job.wait_until_finished()
                job.stop()
            finally:
                status = tunnel.close()
            assert find_violations(job.record()) == []
            assert status == 0
        finally:
            job.close()
