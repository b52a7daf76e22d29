"""`deskrl doctor CONFIG`: ports that another run uses are an error only if this run must have them."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deskrl.analysis import doctor as doctor_package
from deskrl.analysis.doctor import network_checks
from deskrl.analysis.doctor.check_result import Severity
from deskrl.cli.main import main
from deskrl.core.config import RunConfig
from deskrl.launch.port_assignment import assignable_keys

CHOSEN = {"replay.address", "inference.address", "replay.metrics_port", "inference.metrics_port"}


@pytest.fixture
def used_port() -> Iterator[int]:
    """Return a port on which a program listens that is not a role of deskrl."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def severity(results: Sequence[network_checks.CheckResult], subject: str) -> Severity:
    return next(result.severity for result in results if result.subject == subject)


def test_a_used_address_is_an_error_unless_up_chooses_another(used_port: int) -> None:
    address = {"address": f"127.0.0.1:{used_port}"}
    config = RunConfig.model_validate({"replay": address, "inference": address})
    results = list(network_checks.servers(config, [], {"inference.address"}))
    assert severity(results, "replay") is Severity.ERROR
    assert severity(results, "inference-0") is Severity.WARNING
    assert any("will choose another port" in result.message for result in results)


@pytest.mark.parametrize("key", ["replay", "inference"])
def test_a_used_metrics_port_is_an_error_unless_up_chooses_another(used_port: int, key: str) -> None:
    config = RunConfig.model_validate({key: {"metrics_port": used_port}})
    results = list(network_checks.metrics_ports(config, [key]))
    assert severity(results, "metrics") is Severity.ERROR
    results = list(network_checks.metrics_ports(config, [key], {f"{key}.metrics_port"}))
    assert severity(results, "metrics") is Severity.WARNING


def test_up_chooses_the_ports_that_the_user_has_not_set() -> None:
    assert assignable_keys(RunConfig(), ()) >= CHOSEN
    assert "replay.address" not in assignable_keys(RunConfig(), {"replay.address"})
    reachable = RunConfig.model_validate({"replay": {"listen_host": "0.0.0.0"}})
    assert "replay.address" not in assignable_keys(reachable, ())


def test_doctor_knows_which_ports_up_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[frozenset[str]] = []
    monkeypatch.setattr(doctor_package, "doctor", lambda config, roles, keys=frozenset(): chosen.append(keys) or 0)
    path = tmp_path / "run.toml"
    path.write_text('[replay]\naddress = "127.0.0.1:7555"\n')
    assert main(["doctor", str(path), "--inference.metrics_port", "7000"]) == 0
    assert chosen[-1] >= CHOSEN - {"replay.address", "inference.metrics_port"}
    assert not chosen[-1] & {"replay.address", "inference.metrics_port"}
