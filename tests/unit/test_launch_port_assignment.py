"""Port assignment: runs on one machine get free ports, unless the user has set them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.cli.main import main
from deskrl.core.config import RunConfig, dump_config, keys_of_file, load_config, overridden_keys, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch import preflight
from deskrl.launch.port_assignment import PORT_KEYS, PortReservation, assign_ports
from deskrl.launch.run_state import check_same_config

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.fixture
def reservation() -> Iterator[PortReservation]:
    with PortReservation() as held:
        yield held


def ports_of(config: RunConfig) -> list[int]:
    return [endpoint.port for endpoint in preflight.endpoints(config)]


def test_two_runs_of_one_file_have_no_port_in_common(reservation: PortReservation) -> None:
    config = RunConfig.model_validate({"inference": {"num_replicas": 2}, "desktop": {"num_envs": 9}})
    with PortReservation() as other:
        one, two = assign_ports(config, (), reservation), assign_ports(config, (), other)
        num_ports = 1 + 2 + 1 + 2 + config.num_actors + 1
        assert len(ports_of(one)) == num_ports and len({*ports_of(one), *ports_of(two)}) == 2 * num_ports
        preflight.check_ports(one)  # the ports are reserved, and the roles can listen on them


def test_ports_that_the_user_has_set_are_kept(
    reservation: PortReservation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[replay]\naddress = "127.0.0.1:7411"\n[actor]\nmetrics_port = 0\n')
    monkeypatch.setenv("DESKRL_INFERENCE__ADDRESS", "localhost:7500")
    options = ["--learner.metrics_port=9102", "--seed", "1"]
    set_keys = overridden_keys(options) | keys_of_file(file)
    config = assign_ports(load_config(file, options), set_keys, reservation)
    assert (config.replay.address, config.inference.address) == ("127.0.0.1:7411", "localhost:7500")
    assert (config.actor.metrics_port, config.learner.metrics_port) == (0, 9102)
    assert config.replay.metrics_port and config.inference.metrics_port


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"replay": {"address": "replay.example:7411"}}, "replay"),
        ({"replay": {"listen_host": "0.0.0.0"}}, "replay"),
        ({"inference": {"address": "10.0.0.5:7421"}}, "inference"),
    ],
)
def test_addresses_that_other_machines_use_are_kept(
    reservation: PortReservation, values: dict[str, dict[str, str]], key: str
) -> None:
    config = RunConfig.model_validate(values)
    assert getattr(assign_ports(config, (), reservation), key).address == getattr(config, key).address


def test_metrics_that_other_machines_read_are_not_served_without_being_asked(reservation: PortReservation) -> None:
    config = RunConfig.model_validate({"security": {"metrics_host": "0.0.0.0"}})
    assert assign_ports(config, (), reservation).replay.metrics_port == 0


def test_a_resumed_run_keeps_its_ports_if_they_are_free_and_else_takes_others(reservation: PortReservation) -> None:
    config = RunConfig()
    with PortReservation() as first:
        recorded = assign_ports(config, (), first)
    with socket.socket() as taken:
        taken.bind((recorded.inference.address.host, recorded.inference.address.port))
        resumed = assign_ports(config, (), reservation, recorded)
    assert resumed.replay == recorded.replay and resumed.learner == recorded.learner
    assert resumed.inference.address != recorded.inference.address


def test_other_ports_and_trackers_are_no_reason_to_refuse_a_resumed_run(
    tmp_path: Path, reservation: PortReservation
) -> None:
    config = load_config(SMOKE, [f"--runs={tmp_path}"])
    run_dir = RunDir(config.run_dir)
    run_dir.create()
    dump_config(assign_ports(config, (), reservation), run_dir.config)
    check_same_config(config, run_dir)
    check_same_config(load_config(SMOKE, [f"--runs={tmp_path}", f"--replay.address=[::1]:{free_port()}"]), run_dir)
    check_same_config(
        load_config(SMOKE, [f"--runs={tmp_path}", "--tracker=mlflow", "--tracker_options.mlflow.project=p"]), run_dir
    )
    with pytest.raises(UserError, match=r"started with other values of seed \("):
        check_same_config(load_config(SMOKE, [f"--runs={tmp_path}", "--seed=9"]), run_dir)


def test_the_keys_of_ports_exist() -> None:
    from deskrl.core.config.config_errors import known_keys

    assert known_keys() >= PORT_KEYS


def test_a_host_of_another_machine_is_reported_in_one_line(reservation: PortReservation) -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.7: no port is available"):
        reservation.hold_any("192.0.2.7", 1, ())


def test_a_resolved_configuration_can_be_overridden_regardless_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_config(load_config(SMOKE, ["--seed=4"]), tmp_path / "config.json")
    monkeypatch.setenv("DESKRL_SEED", "5")
    config = read_resolved(tmp_path / "config.json", ["--tasks.unmet_requirements=skip"])
    assert (config.seed, config.tasks.unmet_requirements) == (4, "skip")
    assert config.tasks.ids == load_config(SMOKE).tasks.ids
    with pytest.raises(UserError, match=r"tasks\.unmet: unknown key"):
        read_resolved(tmp_path / "config.json", ["--tasks.unmet=skip"])


def test_a_run_does_not_overwrite_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = tmp_path / "judged"
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text("{}")
    assert main(["up", str(SMOKE), f"--runs={tmp_path}", "--name=judged"]) == 2
    assert f"deskrl: {evaluation}: is an evaluation (hint: choose another --name)" in capsys.readouterr().err
    assert [path.name for path in evaluation.iterdir()] == ["evaluation.json"]
