"""Authentication and authorisation between roles, with real servers and channels."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from chaos_kit.clock import Clock, clock_unavailable_reason
from chaos_kit.faulty_relay import FaultyRelay
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from ports_kit import free_port
from replay_kit import ReplayProcess, StartReplay, replay_config

from deskrl.actor.lease_client import LeaseClient
from deskrl.core import rpc
from deskrl.core.config import dump_config
from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.security.authorization import ALLOWED_ROLES
from deskrl.core.security.peer_identity import Identity, load_identity
from deskrl.launch.certificates import CA_KEY, make_certificates
from deskrl.learner.replay_client import ReplayClient as LearnerReplayClient
from deskrl.proto.v1 import directory_pb2, inference_pb2, replay_pb2, rollout_pb2, weights_pb2

SetIdentity = Callable[[Path | None, str], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate directory created by the command."""
    folder = tmp_path_factory.mktemp("security") / "certificates"
    run_deskrl("certificates", str(folder), "--host", "replay.example")
    return folder


@pytest.fixture
def set_identity() -> Iterator[SetIdentity]:
    """Return `set_identity(folder, role)`, which sets the identity of this process; None as the folder removes it."""

    def set_identity(folder: Path | None, role: str) -> None:
        rpc.load_own_identity(role, folder)

    yield set_identity
    rpc.set_identity(None)


@pytest.fixture
def replay(start_replay: StartReplay, folder: Path, set_identity: SetIdentity) -> ReplayProcess:
    """Replay service that listens on all interfaces, with this process as its operator."""
    set_identity(folder, "operator")
    return start_replay(listen_host="0.0.0.0", security=folder)


def run_deskrl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deskrl.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def lease_error(address: str) -> str:
    """Return the error of an actor that requests a lease."""

    async def acquire() -> None:
        client = LeaseClient(address, "actor-0")
        try:
            await client.acquire()
        finally:
            await client.close()

    with pytest.raises(UserError) as raised:
        asyncio.run(asyncio.wait_for(acquire(), 20))
    return str(raised.value)


def re_sign(folder: Path, role: str, until: datetime.datetime) -> None:
    """Replace the certificate of a role by one with another expiry date."""
    path = folder / f"{role}.pem"
    old = x509.load_pem_x509_certificate(path.read_bytes())
    key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), 1, until - datetime.timedelta(days=1), until, list(old.extensions)
    )
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def test_corrupted_bytes_are_not_reported_as_failed_authentication(replay: ReplayProcess) -> None:
    for seed in range(5):
        relay = FaultyRelay(replay.config.replay.address, seed)
        relay.set_corrupting(True)
        try:
            assert not rpc.check_health(relay.address)
        finally:
            relay.close()


@pytest.mark.skipif(bool(clock_unavailable_reason()), reason=f"the clock cannot be set: {clock_unavailable_reason()}")
def test_a_server_whose_clock_is_hours_behind_is_accepted(
    tmp_path: Path, folder: Path, set_identity: SetIdentity
) -> None:
    clock = Clock(tmp_path / "clock")
    clock.shift(-12 * 3600)
    set_identity(folder, "operator")
    prefix = ["env", *(f"{name}={value}" for name, value in clock.environment.items())]
    replay = ReplayProcess(replay_config(tmp_path, security=folder), prefix=prefix)
    try:
        assert replay.client().status().service.unix_s < time.time() - 11 * 3600
    finally:
        replay.close()


def test_secret_files_are_readable_by_their_owner_only(folder: Path) -> None:
    secret = {path for path in folder.iterdir() if stat.S_IMODE(path.stat().st_mode) == 0o600}
    assert secret == {folder / "token", *folder.glob("*-key.pem")}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_creating_certificates_again_keeps_authority_and_token(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = make_certificates(tmp_path, ["new.example"], 30)
    changed = {path.name for path in tmp_path.iterdir() if before[path.name] != path.read_bytes()}
    assert changed == {path.name for path in written} == before.keys() - {"ca.pem", CA_KEY, "token"}
    load_identity(tmp_path, "replay")


def test_only_certificates_of_servers_name_hosts(folder: Path) -> None:
    """The key of an actor must not suffice to impersonate a server."""
    for role, is_server in (("replay", True), ("inference", True), ("actor", False), ("learner", False)):
        extensions = x509.load_pem_x509_certificate((folder / f"{role}.pem").read_bytes()).extensions
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (x509.ExtendedKeyUsageOID.SERVER_AUTH in usages) == is_server
        assert (x509.SubjectAlternativeName in {type(extension.value) for extension in extensions}) == is_server


def test_the_repr_of_an_identity_contains_no_secrets(folder: Path) -> None:
    identity = load_identity(folder, "actor")
    assert identity.token and identity.token not in repr(identity)
    assert "PRIVATE" not in repr(identity)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "actor.pem").unlink(), "actor.pem: No such file"),
        (lambda folder: (folder / "token").write_text(" \n"), "token: empty"),
        (
            lambda folder: (folder / "token").chmod(0o644),
            "token: secret file is readable by all users (hint: chmod 600",
        ),
        (lambda folder: (folder / "actor-key.pem").chmod(0o604), "is readable by all users"),
        (lambda folder: (folder / "actor.pem").write_text("?"), "is damaged"),
        (
            lambda folder: os.replace(folder / "learner-key.pem", folder / "actor-key.pem"),
            "does not match",
        ),
        (lambda folder: re_sign(folder, "actor", datetime.datetime(2020, 1, 1)), "expired on 2020-01-01 00:00 UTC"),
        (lambda folder: re_sign(folder, "actor", datetime.datetime(2220, 1, 1)), "not valid before 2219-12-31"),
    ],
)
def test_invalid_identity_files_are_reported_before_a_role_starts(
    tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    make_certificates(tmp_path / "own", [], 1)
    spoil(tmp_path / "own")
    config = tmp_path / "run.toml"
    config.write_text(f'runs = "{tmp_path}"\nsecurity.certificates_dir = "{tmp_path / "own"}"\n')
    ended = run_deskrl("actor", str(config))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("deskrl: ") and expected in line


def test_listening_on_all_interfaces_requires_certificates(tmp_path: Path) -> None:
    dump_config(replay_config(tmp_path, listen_host="0.0.0.0"), tmp_path / "config.json")
    ended = run_deskrl("replay", str(tmp_path / "config.json"))
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("deskrl: ")]
    assert "0.0.0.0" in line and "`deskrl certificates`" in line


def test_each_role_may_call_its_own_services_only(
    replay: ReplayProcess, folder: Path, set_identity: SetIdentity
) -> None:
    address = replay.config.replay.address
    assert rpc.check_health(address)
    replay.client().status()
    with pytest.raises(grpc.RpcError) as raised:
        replay.client().acquire()
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "role operator may not call deskrl.proto.v1.RolloutService/AcquireLease" in str(raised.value.details())
    set_identity(folder, "learner")
    client = LearnerReplayClient(address, "rank-0", StopEvent())
    client.status()
    client.close()
    assert "role learner may not call deskrl.proto.v1.RolloutService/AcquireLease" in lease_error(address)


def test_a_process_without_valid_credentials_is_rejected(
    replay: ReplayProcess, tmp_path: Path, folder: Path, set_identity: SetIdentity
) -> None:
    address = replay.config.replay.address
    set_identity(None, "")
    assert lease_error(address) == (
        f"the server at {address} requires a certificate "
        "(hint: set security.certificates_dir to the certificate directory of the run)"
    )
    make_certificates(tmp_path / "other", [], 1)
    set_identity(tmp_path / "other", "actor")
    assert f"the certificate of the server at {address} is rejected" in lease_error(address)
    for name in ("actor.pem", "actor-key.pem"):  # valid certificates with the token of another run
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "other" / "ca.pem").write_bytes((folder / "ca.pem").read_bytes())
    set_identity(tmp_path / "other", "actor")
    assert lease_error(address) == (
        f"the server at {address} rejected this process: invalid run token (hint: correct security.certificates_dir)"
    )


@pytest.mark.parametrize("command", [("health", "replay"), ("actor",)], ids=" ".join)
def test_a_command_without_valid_credentials_prints_one_line(
    replay: ReplayProcess, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """gRPC must not print anything in addition."""
    make_certificates(tmp_path / "other", [], 1)
    name, *arguments = command
    security = replay.config.security.model_copy(update={"certificates_dir": tmp_path / "other"})
    dump_config(replay.config.model_copy(update={"security": security}), tmp_path / "config.json")
    ended = run_deskrl(name, str(tmp_path / "config.json"), *arguments)
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert (ended.returncode, len(lines)) == (2, 1), ended.stderr
    assert f"the certificate of the server at {replay.config.replay.address} is rejected" in lines[0]


def test_a_certificate_of_another_authority_is_rejected(replay: ReplayProcess, tmp_path: Path, folder: Path) -> None:
    make_certificates(tmp_path, [], 1)
    identity = load_identity(folder, "actor")
    other = load_identity(tmp_path, "actor")
    (tmp_path / "ca.pem").write_bytes(identity.ca)
    rpc.set_identity(replace(other, ca=identity.ca, token=identity.token))
    assert f"rejects {tmp_path / 'actor.pem'}" in lease_error(replay.config.replay.address)


def test_a_server_certificate_for_another_host_is_rejected(
    replay: ReplayProcess, folder: Path, set_identity: SetIdentity
) -> None:
    set_identity(folder, "actor")
    address = f"127.0.0.2:{replay.config.replay.address.rpartition(':')[2]}"
    line = lease_error(address)
    assert f"the certificate of the server at {address} is rejected" in line
    assert "not valid for '127.0.0.2'" in line and "deskrl certificates --host" in line


def trust_error(server_identity: Identity | None, client_identity: Identity) -> str:
    """Return the error of a client that checks the health of a server with another identity."""

    async def serve_and_ask() -> str:
        address = f"127.0.0.1:{free_port()}"
        rpc.set_identity(server_identity)
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        rpc.set_identity(client_identity)
        try:
            with pytest.raises(UserError) as raised:
                await asyncio.to_thread(rpc.check_health, address)
        finally:
            await server.stop(None)
            rpc.set_identity(None)
        return str(raised.value)

    return asyncio.run(serve_and_ask())


def test_an_expired_server_certificate_is_rejected(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    server, client = load_identity(tmp_path, "replay"), load_identity(tmp_path, "actor")
    re_sign(tmp_path, "replay", datetime.datetime(2020, 1, 1))
    line = trust_error(replace(server, certificate=server.files.certificate.read_bytes()), client)
    assert "is rejected: certificate has expired (hint: renew it with `deskrl certificates`" in line


def test_a_server_without_tls_is_rejected(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    line = trust_error(None, load_identity(tmp_path, "actor"))
    assert "does not use TLS" in line and "start it with the same security.certificates_dir" in line


def test_secrets_appear_in_no_command_line_environment_or_log(replay: ReplayProcess, folder: Path) -> None:
    process = Path(f"/proc/{replay.process.pid}")
    shown = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
    status, log = replay.stop()
    assert status == 0
    for secret in (path.read_text().strip() for path in (folder / "token", *folder.glob("*-key.pem"))):
        assert secret not in log and secret.encode() not in shown


def test_every_service_has_a_list_of_allowed_roles() -> None:
    """A service that is missing in the table would be open to every role."""
    contracts = (directory_pb2, rollout_pb2, replay_pb2, inference_pb2, weights_pb2)
    served = {service.full_name for module in contracts for service in module.DESCRIPTOR.services_by_name.values()}
    assert served == {key.partition("/")[0] for key in ALLOWED_ROLES}
