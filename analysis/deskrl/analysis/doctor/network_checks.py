"""Checks of a run's servers from this machine: names, ports, certificates, health, versions and clocks.

A server that is not started yet gives a warning; one that answers wrongly gives an error.
"""

from __future__ import annotations

import datetime
import errno
import socket
import time
from collections.abc import Collection, Iterator, Sequence

import grpc

from deskrl.analysis.doctor.check_result import CheckResult, Severity, error, failed, ok, run_check, warning
from deskrl.analysis.top import scrape
from deskrl.analysis.top.timeseries import Scrape
from deskrl.core import rpc
from deskrl.core.addresses import HostPort, format_address
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.listening import bind_error, listen_error_hint
from deskrl.core.security.peer_identity import IdentityFiles, load_identity
from deskrl.launch.preflight import Endpoint, endpoints
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc

_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 1.0
_MAX_CLOCK_SKEW_S = 2.0
_RENEWAL_DAYS = 14


def certificates(config: RunConfig, roles: Sequence[str]) -> Iterator[CheckResult]:
    """Check the certificates of the roles of this machine."""
    folder = config.security.certificates_dir
    if folder is None:
        message = "not used, as all addresses are on this machine"
        yield run_check("certificates", message, lambda: _check_not_exposed(config))
        return
    for role in roles:
        subject = f"certificate of {role}"
        try:
            load_identity(folder, role)
        except UserError as cause:
            yield failed(subject, cause)
        else:
            yield _expiry(subject, IdentityFiles(folder, role))


def _check_not_exposed(config: RunConfig) -> None:
    """Raise UserError if a server of the run is not on a loopback address."""
    for address in (config.replay.address, *config.inference.replica_addresses):
        rpc.check_exposure(address)


def _expiry(subject: str, files: IdentityFiles) -> CheckResult:
    """Check that a certificate does not expire soon."""
    from cryptography import x509

    end = x509.load_pem_x509_certificate(files.certificate.read_bytes()).not_valid_after_utc
    message = f"valid until {end:%Y-%m-%d}"
    if end - datetime.datetime.now(datetime.UTC) < datetime.timedelta(days=_RENEWAL_DAYS):
        return warning(subject, message, "create it again with `deskrl certificates`")
    return ok(subject, message)


def servers(config: RunConfig, roles: Sequence[str], chosen_keys: Collection[str] = ()) -> Iterator[CheckResult]:
    """Check that replay and the replicas answer, and that their version and clock agree with those of this machine.

    Args:
        config: run configuration.
        roles: roles that are to run on this machine.
        chosen_keys: keys of the ports that `deskrl up` chooses, which another run may use at present.
    """
    servers_by_role = {
        "replay": [(config.replay.address, "replay")],
        "inference": [
            (address, f"inference-{index}") for index, address in enumerate(config.inference.replica_addresses)
        ],
    }
    for role, addresses in servers_by_role.items():
        for address, name in addresses:
            for result in _server(name, address, runs_here=role in roles):
                yield _with_chosen_port(result, f"{role}.address", chosen_keys)


def _server(name: str, address: HostPort, *, runs_here: bool) -> Iterator[CheckResult]:
    """Check one server; `runs_here`: whether its role is to run on this machine."""
    try:
        socket.getaddrinfo(address.host, address.port)
    except OSError as cause:
        message = f"the host name {address.host} cannot be resolved: {cause.strerror}"
        yield error(name, message, f"correct the address {address}, or the DNS entry")
        return
    try:
        is_healthy = rpc.check_health(address)
    except UserError as cause:
        yield failed(name, cause)
        return
    if not is_healthy:
        yield _unhealthy(name, address, runs_here=runs_here)
        return
    service = _read_status(name, address)
    yield ok(name, f"serves at {address}" + (f", deskrl {service.version}" if service else ""))
    if service is not None:
        yield from _compare(name, service)


def _with_chosen_port(result: CheckResult, key: str, chosen_keys: Collection[str]) -> CheckResult:
    """Return a warning in place of an error about a port that `deskrl up` does not use, because it is in use."""
    if result.severity is not Severity.ERROR or key not in chosen_keys:
        return result
    message = f"{result.message}; `deskrl up` will choose another port"
    return warning(result.subject, message, f"to start the roles one by one, set {key} to a free port")


def _unhealthy(name: str, address: HostPort, *, runs_here: bool) -> CheckResult:
    """Find out why a server does not answer: not started, unreachable, or another program on its port."""
    try:
        with socket.create_connection((address.host, address.port), _TIMEOUT_S) as connection:
            if _is_closed(connection):
                return warning(name, f"the tunnel at {address} has no server at its other end: it is not started")
            key = "replay.address" if name == "replay" else "inference.address"
            return error(name, f"another program listens on {address}", f"set {key} to a free port")
    except ConnectionRefusedError:
        state = "not started" + ("" if runs_here else " on its machine")
        return warning(name, f"no server listens on {address}: {state}")
    except OSError as cause:
        message = f"{address} is not reachable: {cause.strerror or 'no answer'}"
        return error(name, message, "possibly a firewall or a tunnel between the machines blocks the port")


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the peer closes the connection at once, like an SSH tunnel without a server at its end."""
    connection.settimeout(_CLOSE_TIMEOUT_S)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def _compare(name: str, service: common_pb2.ServiceStatus) -> Iterator[CheckResult]:
    """Compare version and clock of a server with those of this machine."""
    if service.version and service.version != rpc.VERSION:
        message = f"{name} runs deskrl {service.version}, this machine has {rpc.VERSION}"
        yield error("versions", message, "install the same version of deskrl on both")
    skew_s = service.unix_s - time.time()
    if service.unix_s and abs(skew_s) > _MAX_CLOCK_SKEW_S:
        direction = "ahead of" if skew_s > 0 else "behind"
        message = f"the clock of {name} is {abs(skew_s):.0f} s {direction} the clock of this machine"
        yield error("clocks", message, "synchronise both clocks with NTP; certificates and reports depend on them")


def _read_status(name: str, address: str) -> common_pb2.ServiceStatus | None:
    """Return the status that the server reports; None if the call fails."""
    with rpc.connect_sync(address) as channel:
        try:
            if name == "replay":
                replay_status = replay_pb2_grpc.ReplayServiceStub(channel).GetReplayStatus(
                    replay_pb2.GetReplayStatusRequest(), timeout=_TIMEOUT_S
                )
                return common_pb2.ServiceStatus.FromString(replay_status.service.SerializeToString())
            request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", "doctor"))
            model_info = inference_pb2_grpc.InferenceServiceStub(channel).GetModelInfo(request, timeout=_TIMEOUT_S)
            return common_pb2.ServiceStatus.FromString(model_info.service.SerializeToString())
        except grpc.RpcError:
            return None


def metrics_ports(config: RunConfig, roles: Sequence[str], chosen_keys: Collection[str] = ()) -> Iterator[CheckResult]:
    """Check that the other ports of this machine's roles are free, or that the roles already listen on them.

    Args:
        config: run configuration.
        roles: roles that are to run on this machine.
        chosen_keys: keys of the ports that `deskrl up` chooses, which another run may use at present.
    """
    others = [it for it in endpoints(config) if not it.key.endswith(".address") and it.key.partition(".")[0] in roles]
    taken = [
        (endpoint, cause) for endpoint in others if (cause := bind_error(endpoint.host, endpoint.port)) is not None
    ]
    for_metrics = [(it, cause) for it, cause in taken if it.key.endswith(".metrics_port")]
    answers = scrape.read_all([scrape.address_of(endpoint) for endpoint, _ in for_metrics])
    answering = [it for it, _ in for_metrics if _is_ours(answers.get(scrape.address_of(it), {}))]
    for endpoint, cause in for_metrics:
        if cause.errno != errno.EADDRINUSE:
            message = f"cannot listen on {_named(endpoint)}: {cause.strerror}"
            yield error("metrics", message, listen_error_hint(cause, endpoint.key))
        elif endpoint not in answering:
            message = f"another program listens on {_named(endpoint)}"
            result = error("metrics", message, listen_error_hint(cause, endpoint.key))
            yield _with_chosen_port(result, endpoint.key, chosen_keys)
    if answering:
        message = f"Prometheus metrics are served on {', '.join(map(_named, answering))}"
        if all(rpc.is_loopback(endpoint.host) for endpoint in answering):
            message += ", for this machine only (set security.metrics_host for others)"
        yield ok("metrics", message)
    others_taken = [endpoint for endpoint, _ in taken if not endpoint.key.endswith(".metrics_port")]
    if others_taken:
        listed = ", ".join(map(_named, others_taken))
        yield warning("ports", f"in use: {listed}", "if this run is not running, choose other ports")
    if len(others) > len(taken):
        yield ok("ports", f"{len(others) - len(taken)} other ports are free")


def _named(endpoint: Endpoint) -> str:
    return f"{format_address(endpoint.host, endpoint.port)} ({endpoint.key})"


def _is_ours(scraped: Scrape) -> bool:
    """Return whether a role of deskrl served these metrics."""
    return any(name.startswith("deskrl_") for name, _ in scraped)
