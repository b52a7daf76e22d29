"""Who may talk to whom: certificates, tokens and roles, on real servers over real channels."""

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
from chaos_kit.clock import Clock, why_no_clock
from chaos_kit.wire import FaultyRelay
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from ports_kit import free_port
from replay_kit import ReplayProcess, StartReplay, replay_config

from deskrl.actor.replay_client import ReplayClient
from deskrl.core import rpc
from deskrl.core.config import dump_config
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.core.security.admission import CALLERS
from deskrl.core.security.certificates import CA_KEY, make_certificates
from deskrl.core.security.identity import Identity, load_identity
from deskrl.learner.replay_client import ReplayClient as LearnerReplayClient
from deskrl.proto.v1 import directory_pb2, inference_pb2, replay_pb2, rollout_pb2, weights_pb2

Be = Callable[[Path | None, str], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates as the command makes them."""
    folder = tmp_path_factory.mktemp("security") / "certificates"
    run_deskrl("certificates", str(folder), "--host", "replay.example")
    return folder


@pytest.fixture
def be() -> Iterator[Be]:
    """`be(folder, role)`: this process is that role from now on; a folder of None: nobody."""

    def be(folder: Path | None, role: str) -> None:
        rpc.identify_as(role, folder)

    yield be
    rpc.identify(None)


@pytest.fixture
def replay(start_replay: StartReplay, folder: Path, be: Be) -> ReplayProcess:
    """A replay service that other machines could reach, and this process its operator."""
    be(folder, "operator")
    return start_replay(listen_host="0.0.0.0", security=folder)


def run_deskrl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deskrl.core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def refusal_at(address: str) -> str:
    """The one line with which a role that needs replay gives up."""

    async def acquire() -> None:
        client = ReplayClient(address, "actor-0")
        try:
            await client.acquire()
        finally:
            await client.close()

    with pytest.raises(UserError) as refusal:
        asyncio.run(asyncio.wait_for(acquire(), 20))
    return str(refusal.value)


def re_sign(folder: Path, role: str, until: datetime.datetime) -> None:
    """Give a role's certificate another end."""
    path = folder / f"{role}.pem"
    old = x509.load_pem_x509_certificate(path.read_bytes())
    key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), 1, until - datetime.timedelta(days=1), until, list(old.extensions)
    )
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def test_a_server_is_no_stranger_where_bytes_are_corrupted_on_their_way(replay: ReplayProcess) -> None:
    for seed in range(5):
        relay = FaultyRelay(replay.config.replay.address, seed)
        relay.corrupt(True)
        try:
            assert not rpc.check_health(relay.address)
        finally:
            relay.close()


@pytest.mark.skipif(bool(why_no_clock()), reason=f"no clock can be set: {why_no_clock()}")
def test_a_server_whose_clock_is_hours_behind_is_let_in_and_lets_in(tmp_path: Path, folder: Path, be: Be) -> None:
    clock = Clock(tmp_path / "clock")
    clock.shift(-12 * 3600)
    be(folder, "operator")
    prefix = ["env", *(f"{name}={value}" for name, value in clock.environment.items())]
    replay = ReplayProcess(replay_config(tmp_path, security=folder), prefix=prefix)
    try:
        assert replay.client().status().service.unix_s < time.time() - 11 * 3600
    finally:
        replay.close()


def test_secrets_are_their_owners_alone(folder: Path) -> None:
    secret = {path for path in folder.iterdir() if stat.S_IMODE(path.stat().st_mode) == 0o600}
    assert secret == {folder / "token", *folder.glob("*-key.pem")}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_command_again_keeps_what_was_handed_out_and_renews_the_roles(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = make_certificates(tmp_path, ["new.example"], 30)
    changed = {path.name for path in tmp_path.iterdir() if before[path.name] != path.read_bytes()}
    assert changed == {path.name for path in written} == before.keys() - {"ca.pem", CA_KEY, "token"}
    load_identity(tmp_path, "replay")


def test_only_servers_have_certificates_for_hosts(folder: Path) -> None:
    """Who takes an actor's key cannot pass for replay."""
    for role, is_server in (("replay", True), ("inference", True), ("actor", False), ("learner", False)):
        extensions = x509.load_pem_x509_certificate((folder / f"{role}.pem").read_bytes()).extensions
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (x509.ExtendedKeyUsageOID.SERVER_AUTH in usages) == is_server
        assert (x509.SubjectAlternativeName in {type(extension.value) for extension in extensions}) == is_server


def test_the_text_form_of_an_identity_holds_no_secret(folder: Path) -> None:
    identity = load_identity(folder, "actor")
    assert identity.token and identity.token not in repr(identity)
    assert "PRIVATE" not in repr(identity)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "actor.pem").unlink(), "actor.pem: No such file"),
        (lambda folder: (folder / "token").write_text(" \n"), "token is empty"),
        (lambda folder: (folder / "token").chmod(0o644), "token is secret and can be read by everybody; chmod 600"),
        (lambda folder: (folder / "actor-key.pem").chmod(0o604), "can be read by everybody"),
        (lambda folder: (folder / "actor.pem").write_text("?"), "is damaged"),
        (
            lambda folder: os.replace(folder / "learner-key.pem", folder / "actor-key.pem"),
            "is not the key to",
        ),
        (lambda folder: re_sign(folder, "actor", datetime.datetime(2020, 1, 1)), "expired on 2020-01-01 00:00 UTC"),
        (lambda folder: re_sign(folder, "actor", datetime.datetime(2220, 1, 1)), "is valid from 2219-12-31"),
    ],
)
def test_what_is_wrong_with_ones_own_files_is_told_before_anything_starts(
    tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    make_certificates(tmp_path / "own", [], 1)
    spoil(tmp_path / "own")
    config = tmp_path / "run.toml"
    config.write_text(f'runs = "{tmp_path}"\nsecurity.folder = "{tmp_path / "own"}"\n')
    ended = run_deskrl("actor", str(config))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("deskrl: ") and expected in line


def test_what_other_machines_can_reach_asks_for_certificates(tmp_path: Path) -> None:
    dump_config(replay_config(tmp_path, listen_host="0.0.0.0"), tmp_path / "config.json")
    ended = run_deskrl("replay", str(tmp_path / "config.json"))
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("deskrl: ")]
    assert "0.0.0.0" in line and "`deskrl certificates`" in line


def test_each_role_reaches_what_is_its_own_and_nothing_else(replay: ReplayProcess, folder: Path, be: Be) -> None:
    address = replay.config.replay.address
    assert rpc.check_health(address)
    replay.client().status()
    with pytest.raises(grpc.RpcError) as refusal:
        replay.client().acquire()
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "RolloutService/AcquireLease is not for the role operator" in str(refusal.value.details())
    be(folder, "learner")
    client = LearnerReplayClient(address, "rank-0", StopEvent())
    client.status()
    client.close()
    assert "RolloutService/AcquireLease is not for the role learner" in refusal_at(address)


def test_a_stranger_is_refused_in_one_line(replay: ReplayProcess, tmp_path: Path, folder: Path, be: Be) -> None:
    address = replay.config.replay.address
    be(None, "")
    assert refusal_at(address) == (
        f"the server at {address} asks for a certificate; set security.folder to the folder of the run's certificates"
    )
    make_certificates(tmp_path / "other", [], 1)
    be(tmp_path / "other", "actor")
    assert f"the certificate of the server at {address} is refused" in refusal_at(address)
    for name in ("actor.pem", "actor-key.pem"):  # ours to trust, theirs to show
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "other" / "ca.pem").write_bytes((folder / "ca.pem").read_bytes())
    be(tmp_path / "other", "actor")
    assert refusal_at(address) == (
        f"the server at {address} refuses this process: the token is another one; mend security.folder"
    )


@pytest.mark.parametrize("command", [("health", "replay"), ("actor",)], ids=" ".join)
def test_a_person_who_is_a_stranger_sees_one_line(
    replay: ReplayProcess, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """And nothing of what gRPC's core would write beside it."""
    make_certificates(tmp_path / "other", [], 1)
    name, *arguments = command
    security = replay.config.security.model_copy(update={"folder": tmp_path / "other"})
    dump_config(replay.config.model_copy(update={"security": security}), tmp_path / "config.json")
    ended = run_deskrl(name, str(tmp_path / "config.json"), *arguments)
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert (ended.returncode, len(lines)) == (2, 1), ended.stderr
    assert f"the certificate of the server at {replay.config.replay.address} is refused" in lines[0]


def test_a_caller_of_another_authority_is_refused(replay: ReplayProcess, tmp_path: Path, folder: Path) -> None:
    make_certificates(tmp_path, [], 1)
    identity = load_identity(folder, "actor")
    stranger = load_identity(tmp_path, "actor")
    (tmp_path / "ca.pem").write_bytes(identity.ca)
    rpc.identify(replace(stranger, ca=identity.ca, token=identity.token))
    assert f"refuses {tmp_path / 'actor.pem'}" in refusal_at(replay.config.replay.address)


def test_a_server_for_another_host_is_refused(replay: ReplayProcess, folder: Path, be: Be) -> None:
    be(folder, "actor")
    address = f"127.0.0.2:{replay.config.replay.address.rpartition(':')[2]}"
    line = refusal_at(address)
    assert f"the certificate of the server at {address} is refused" in line
    assert "not valid for '127.0.0.2'" in line and "deskrl certificates --host" in line


def line_before(server_identity: Identity | None, client_identity: Identity) -> str:
    """How a client is refused, or refuses, before a server that was started with its own idea of security."""

    async def serve_and_ask() -> str:
        address = f"127.0.0.1:{free_port()}"
        rpc.identify(server_identity)
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        rpc.identify(client_identity)
        try:
            with pytest.raises(UserError) as refusal:
                await asyncio.to_thread(rpc.check_health, address)
        finally:
            await server.stop(None)
            rpc.identify(None)
        return str(refusal.value)

    return asyncio.run(serve_and_ask())


def test_a_server_whose_time_ran_out_is_refused(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    server, client = load_identity(tmp_path, "replay"), load_identity(tmp_path, "actor")
    re_sign(tmp_path, "replay", datetime.datetime(2020, 1, 1))
    line = line_before(replace(server, certificate=server.files.certificate.read_bytes()), client)
    assert "is refused: certificate has expired; make it anew with `deskrl certificates`" in line


def test_a_server_without_encryption_is_refused(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 1)
    line = line_before(None, load_identity(tmp_path, "actor"))
    assert "speaks without encryption" in line and "start it with the same security.folder" in line


def test_no_role_shows_a_secret(replay: ReplayProcess, folder: Path) -> None:
    """Not on its command line, not in its environment, not in its log."""
    process = Path(f"/proc/{replay.process.pid}")
    shown = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
    status, log = replay.stop()
    assert status == 0
    for secret in (path.read_text().strip() for path in (folder / "token", *folder.glob("*-key.pem"))):
        assert secret not in log and secret.encode() not in shown


def test_everything_that_is_called_is_meant_for_somebody() -> None:
    """A service that is left out of the table would be for every role."""
    contracts = (directory_pb2, rollout_pb2, replay_pb2, inference_pb2, weights_pb2)
    served = {service.full_name for module in contracts for service in module.DESCRIPTOR.services_by_name.values()}
    assert served == {key.partition("/")[0] for key in CALLERS}
