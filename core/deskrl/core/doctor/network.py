"""Checks of a run's servers as this machine sees them: names, ports, certificates, health, clocks.

Knows the contracts. A server that nobody has started yet is worth a note; one that is there and refuses is bad.
"""

from __future__ import annotations

import datetime
import errno
import socket
import time
from collections.abc import Iterator, Sequence

import grpc

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.doctor.findings import Finding, attempt, bad, good, note
from deskrl.core.errors import UserError
from deskrl.core.exposition import mend_for
from deskrl.core.running.preflight import Endpoint, endpoints
from deskrl.core.security.identity import IdentityFiles, load_identity
from deskrl.core.top import scrape
from deskrl.core.top.window import Scrape
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc, replay_pb2, replay_pb2_grpc

_TIMEOUT_S = 5.0
_PATIENCE_S = 1.0
_MOST_SKEW_S = 2.0
_RENEW_WITHIN_DAYS = 14


def certificates(config: RunConfig, roles: Sequence[str]) -> Iterator[Finding]:
    """The certificates of the roles of this machine."""
    folder = config.security.folder
    if folder is None:
        yield attempt("certificates", "none, and none are needed on one machine", lambda: _refuse_exposed(config))
        return
    for role in roles:
        what = f"certificate of {role}"
        try:
            load_identity(folder, role)
        except UserError as error:
            yield bad(what, error.message, error.mend)
        else:
            yield _expiry(what, IdentityFiles(folder, role))


def _refuse_exposed(config: RunConfig) -> None:
    for address in (config.replay.address, *config.inference.replica_addresses):
        rpc.refuse_exposure(address)


def _expiry(what: str, files: IdentityFiles) -> Finding:
    from cryptography import x509

    end = x509.load_pem_x509_certificate(files.certificate.read_bytes()).not_valid_after_utc
    detail = f"valid until {end:%Y-%m-%d}"
    if end - datetime.datetime.now(datetime.UTC) < datetime.timedelta(days=_RENEW_WITHIN_DAYS):
        return note(what, detail, "make it anew with `deskrl certificates`")
    return good(what, detail)


def servers(config: RunConfig, roles: Sequence[str]) -> Iterator[Finding]:
    """Replay and the replicas: reachable, and with the right time; else whether they could listen here."""
    found = {
        "replay": [(config.replay.address, "replay")],
        "inference": [
            (address, f"inference-{index}") for index, address in enumerate(config.inference.replica_addresses)
        ],
    }
    for role, addresses in found.items():
        for address, name in addresses:
            yield from _server(name, address, runs_here=role in roles)


def _server(name: str, address: str, *, runs_here: bool) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        yield bad(
            name, f"the name {host} is not known here: {error.strerror}", f"mend its address ({address}), or the DNS"
        )
        return
    try:
        is_well = rpc.check_health(address)
    except UserError as error:
        yield bad(name, error.message, error.mend)
        return
    if not is_well:
        yield _absent(name, host, int(port), runs_here=runs_here)
        return
    service = _ask(name, address)
    yield good(name, f"serves at {address}" + (f", deskrl {service.version}" if service else ""))
    if service is not None:
        yield from _comparison(name, service)


def _absent(name: str, host: str, port: int, *, runs_here: bool) -> Finding:
    """Not started yet, unreachable, or something else is in its place."""
    address = f"{host}:{port}"
    try:
        with socket.create_connection((host.strip("[]"), port), _TIMEOUT_S) as connection:
            if _is_ended(connection):
                return note(name, f"the tunnel at {address} leads nowhere: it is not started at the other end")
            return bad(name, f"something else than a server of deskrl listens at {address}", "choose another port")
    except ConnectionRefusedError:
        started = "it is not started" + ("" if runs_here else " there")
        return note(name, f"nobody listens at {address}: {started}")
    except OSError as error:
        reason = f"{address} cannot be reached: {error.strerror or 'no answer'}"
        return bad(name, reason, "look at firewalls and tunnels between the machines")


def _is_ended(connection: socket.socket) -> bool:
    """Whether whoever took the connection ends it at once, unasked, as SSH does that finds nobody at the far end."""
    connection.settimeout(_PATIENCE_S)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def _comparison(name: str, service: common_pb2.ServiceStatus) -> Iterator[Finding]:
    if service.version and service.version != rpc.VERSION:
        detail = f"{name} is deskrl {service.version}, this machine has {rpc.VERSION}"
        yield bad("versions", detail, "install the same version of deskrl on both")
    skew_s = service.unix_s - time.time()
    if service.unix_s and abs(skew_s) > _MOST_SKEW_S:
        detail = f"the clock at {name} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this one"
        yield bad("clocks", detail, "set both by NTP: certificates and reports go by the time")


def _ask(name: str, address: str) -> common_pb2.ServiceStatus | None:
    """What the server says of itself; None if it does not."""
    with rpc.connect_sync(address) as channel:
        try:
            if name == "replay":
                counted = replay_pb2_grpc.ReplayServiceStub(channel).GetReplayStatus(
                    replay_pb2.GetReplayStatusRequest(), timeout=_TIMEOUT_S
                )
                return common_pb2.ServiceStatus.FromString(counted.service.SerializeToString())
            request = inference_pb2.GetModelInfoRequest(peer=rpc.peer("operator", "doctor"))
            served = inference_pb2_grpc.InferenceServiceStub(channel).GetModelInfo(request, timeout=_TIMEOUT_S)
            return common_pb2.ServiceStatus.FromString(served.service.SerializeToString())
        except grpc.RpcError:
            return None


def metrics_ports(config: RunConfig, roles: Sequence[str]) -> Iterator[Finding]:
    """The other ports on which the roles of this machine listen: free for them, or theirs already."""
    others = [it for it in endpoints(config) if not it.key.endswith(".address") and it.key.partition(".")[0] in roles]
    refusals = [(endpoint, error) for endpoint in others if (error := _refusal(endpoint)) is not None]
    for_metrics = [(it, error) for it, error in refusals if it.key.endswith(".metrics_port")]
    answers = scrape.read_all([scrape.address_of(endpoint) for endpoint, _ in for_metrics])
    answering = [it for it, _ in for_metrics if _is_ours(answers.get(scrape.address_of(it), {}))]
    for endpoint, error in for_metrics:
        if error.errno != errno.EADDRINUSE:
            detail = f"{_named(endpoint)} cannot be listened on: {error.strerror}"
            yield bad("metrics", detail, mend_for(error, endpoint.key))
        elif endpoint not in answering:
            yield bad("metrics", f"something else listens at {_named(endpoint)}", mend_for(error, endpoint.key))
    if answering:
        detail = f"Prometheus is answered at {', '.join(map(_named, answering))}"
        if all(rpc.is_loopback(endpoint.host) for endpoint in answering):
            detail += ": on loopback, so one of this machine (for another set security.metrics_host)"
        yield good("metrics", detail)
    taken = [endpoint for endpoint, _ in refusals if not endpoint.key.endswith(".metrics_port")]
    if taken:
        listed = ", ".join(map(_named, taken))
        yield note("ports", f"taken: {listed}; by this run, if it is running", "else choose others")
    if len(others) > len(refusals):
        yield good("ports", f"{len(others) - len(refusals)} further ports are free")


def _named(endpoint: Endpoint) -> str:
    return f"{endpoint.host}:{endpoint.port} ({endpoint.key})"


def _is_ours(scraped: Scrape) -> bool:
    """Whether it is a role of deskrl that answered so."""
    return any(name.startswith("deskrl_") for name, _ in scraped)


def _refusal(endpoint: Endpoint) -> OSError | None:
    """Why nothing more can listen there; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError as error:
            return error
    return None
