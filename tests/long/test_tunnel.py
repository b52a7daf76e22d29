"""Desktops on one machine, everything else on another, and between them nothing but a tunnel, which breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_kit.checks import find_wrong
from chaos_kit.disk import why_no_disk
from chaos_kit.job import ACTORS, ChaosJob, build_model
from tunnel_kit import IS_DOWN, IS_OPEN, Tunnel, other_machine, why_no_tunnel

from deskrl.core import rpc
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc

NUM_UPDATES = 12
PATIENCE_S = 180.0

pytestmark = [
    pytest.mark.skipif(bool(why_no_tunnel()), reason=f"no tunnel: {why_no_tunnel()}"),
    pytest.mark.skipif(bool(why_no_disk()), reason=f"the job needs a small disk: {why_no_disk()}"),
]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain until {what}"
        time.sleep(0.05)


def num_leased(job: ChaosJob) -> int:
    """Episodes that somebody is taken to be at, as replay sees it."""
    rpc.identify_as("operator", job.config.security.folder)
    try:
        with rpc.connect_sync(job.config.replay.address) as channel:
            stub = replay_pb2_grpc.ReplayServiceStub(channel)
            status = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=20.0)
            return sum(queue.num_leased for queue in status.queues)
    finally:
        rpc.identify(None)


def test_a_run_whose_desktops_are_behind_a_tunnel_gets_over_its_breaking(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    with other_machine() as machine:
        job = ChaosJob(tmp_path, "tunnel", NUM_UPDATES, 1, model, actor_prefix=machine.prefix)
        try:
            ports = [int(job.links[link].address.rpartition(":")[2]) for link in ("actor~replay", "actor~inference")]
            wait_until(
                lambda: all((job.folder.logs / f"{name}.log").stat().st_size for name in ACTORS),
                "actors without a tunnel wait for one",
            )
            assert job.acknowledged == []
            tunnel = Tunnel(machine, job.seen_by("actor"), tmp_path, ports)
            try:
                job.wait_until_running()

                machine.pull()
                wait_until(lambda: tunnel.count(IS_DOWN) > 0, "the dead line is found out")
                wait_until(lambda: num_leased(job) == 0, "leases of who cannot be reached run out")
                before = len(job.acknowledged)
                machine.plug()
                wait_until(lambda: tunnel.count(IS_OPEN) == 2, "the tunnel is open again")
                wait_until(lambda: len(job.acknowledged) > before, "episodes go on")

                os.kill(tunnel.client, signal.SIGKILL)
                wait_until(lambda: tunnel.count(IS_OPEN) == 3, "a tunnel that was killed is opened again")
                assert not job.is_learnt
                job.wait_until_learnt()
                job.end()
            finally:
                status = tunnel.close()
            assert find_wrong(job.record()) == []
            assert status == 0
        finally:
            job.close()
