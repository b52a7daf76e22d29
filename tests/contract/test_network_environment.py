"""Channels between roles: they use no proxy of the environment, and IPv6 addresses work like IPv4 addresses."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ports_kit import free_port
from replay_kit import StartReplay

from deskrl.actor.agent import external_server
from deskrl.actor.agent.external_policy import ExternalClient
from deskrl.actor.desktops import http_client
from deskrl.actor.desktops.remote import RemoteDesktop
from deskrl.analysis.top import scrape
from deskrl.core import rpc
from deskrl.core.addresses import HostPort
from deskrl.core.config import DesktopConfig, InferenceConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.listening import bind_error
from deskrl.core.metrics_server import serve_metrics
from deskrl.launch import preflight
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc

PROXY = "http://127.0.0.1:1"
"""Proxy that cannot be reached."""
PROXY_VARIABLES = [
    *("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"),
    *("grpc_proxy", "GRPC_PROXY", "all_proxy", "ALL_PROXY"),
]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
HOSTS = ["127.0.0.1", "localhost", pytest.param("::1", marks=needs_ipv6)]


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set all variables that name a proxy to one that cannot be reached."""
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, PROXY)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


def free_port_of(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@pytest.mark.usefixtures("proxies")
@pytest.mark.parametrize("host", HOSTS)
def test_replay_serves_its_clients(start_replay: StartReplay, host: str) -> None:
    """The service and this client are processes of an environment with proxies."""
    address = HostPort.of(host, free_port_of(host))
    process = start_replay(address=address, metrics_port=(metrics_port := free_port()))
    assert process.config.replay.address == address
    assert rpc.check_health(address)

    async def status() -> replay_pb2.GetReplayStatusResponse:
        async with rpc.connect(address) as channel:
            stub = replay_pb2_grpc.ReplayServiceStub(channel)
            return await stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=60)

    assert asyncio.run(status()).service.version == rpc.VERSION
    with rpc.connect_sync(address) as channel:
        stub = replay_pb2_grpc.ReplayServiceStub(channel)
        assert stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=60).service.version == rpc.VERSION
    assert scrape.read_all([f"127.0.0.1:{metrics_port}"])


@needs_ipv6
@pytest.mark.usefixtures("proxies")
def test_metrics_are_served_and_read_at_an_ipv6_address() -> None:
    port = free_port_of("::1")
    serve_metrics("::1", port, "replay.metrics_port")
    address = scrape.address_of(preflight.Endpoint("replay.metrics_port", "::", port))
    assert address == f"[::1]:{port}" and scrape.read_all([address])
    with pytest.raises(UserError, match=rf"cannot listen on \[::1\]:{port}: Address already in use.*free port"):
        serve_metrics("::1", port, "replay.metrics_port")


@needs_ipv6
def test_a_port_in_use_at_an_ipv6_address_is_found_before_the_start() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        config = RunConfig.model_validate({"replay": {"address": f"[::1]:{port}"}})
        with pytest.raises(UserError, match=rf"replay.address: cannot listen on \[::1\]:{port}: Address already"):
            preflight.check_ports(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replay": {"address": "192.0.2.1:7411"}}, "hint: set replay.listen_host to an address of this machine"),
        ({"inference": {"listen_host": "192.0.2.1"}}, "hint: set inference.listen_host to an address of this machine"),
        (
            {"security": {"metrics_host": "192.0.2.1"}, "replay": {"metrics_port": 9100}},
            "hint: set security.metrics_host",
        ),
    ],
)
def test_the_hint_for_an_address_of_another_machine_names_its_host(
    values: dict[str, dict[str, object]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "check_exposure", lambda address: None)
    defaults = {"replay": {"address": f"127.0.0.1:{free_port()}"}, "inference": {"address": f"127.0.0.1:{free_port()}"}}
    merged = {section: defaults.get(section, {}) | values.get(section, {}) for section in {*defaults, *values}}
    with pytest.raises(UserError, match=f"cannot listen on 192.0.2.1.*{message}"):
        preflight.check_ports(RunConfig.model_validate(merged))


def test_a_host_that_does_not_exist_is_named() -> None:
    error = bind_error("no-such-host.invalid", 7411)
    assert isinstance(error, socket.gaierror)


@needs_ipv6
@pytest.mark.parametrize("address", ["[::]:7411", "[2001:db8::1]:7411"])
def test_an_ipv6_address_that_others_can_reach_requires_certificates(address: str) -> None:
    with pytest.raises(UserError, match="reachable from other machines"):
        rpc.check_exposure(address)
    rpc.check_exposure("[::1]:7411")


class _OpenAiServer(BaseHTTPRequestHandler):
    """Minimal server of OpenAI's protocol."""

    def _reply(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply({"choices": [{"message": {"content": "wait()"}}]})

    def log_message(self, *arguments: object) -> None:
        pass


class _Ipv6Server(HTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture(params=HOSTS)
def http_server(request: pytest.FixtureRequest) -> Iterator[HostPort]:
    kind = _Ipv6Server if ":" in request.param else HTTPServer
    with kind((request.param, 0), _OpenAiServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield HostPort.of(request.param, server.server_address[1])
        server.shutdown()


@pytest.mark.usefixtures("proxies")
def test_an_external_server_on_this_machine_is_reached_without_the_proxy(http_server: HostPort) -> None:
    config = InferenceConfig.model_validate({"external_url": f"http://{http_server}/v1", "external_model": "m"})
    external_server.check_reachable(config)
    reply = asyncio.run(ExternalClient(config, timeout_s=10).complete([], temperature=1.0, seed=0))
    assert reply == "wait()"


@pytest.mark.usefixtures("proxies")
def test_an_external_server_on_another_machine_is_reached_through_the_proxy() -> None:
    config = InferenceConfig.model_validate({"external_url": "http://192.0.2.1:9000/v1", "external_model": "m"})
    with pytest.raises(UserError, match="Connection refused"):  # by the proxy
        external_server.check_reachable(config)


@pytest.mark.usefixtures("proxies")
def test_a_guest_at_any_address_is_reached_without_the_proxy(
    http_server: HostPort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_ready(self: RemoteDesktop, deadline_s: float, name: str) -> None:
        reply = await http_client.send_request(self.address, "GET", "/platform", timeout_s=10)
        assert reply.status == 200

    monkeypatch.setattr(RemoteDesktop, "wait_until_ready", is_ready)
    config = DesktopConfig.model_validate({"provider": "remote", "remote": {"addresses": [http_server]}})
    desktop = RemoteDesktop(config, tmp_path)

    async def start() -> None:
        await desktop.start()
        assert desktop.address == (http_server.host, http_server.port)
        await desktop.close()

    asyncio.run(start())
