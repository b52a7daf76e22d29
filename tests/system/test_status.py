"""`deskrl status` and `deskrl top` when not all is well; that all is well is seen on a whole run (test_run)."""

from __future__ import annotations

from pathlib import Path

import pytest
from ports_kit import free_port
from replay_kit import ReplayProcess, StartReplay, begin, fault, replay_config

from deskrl.core import rpc
from deskrl.core.cli import main
from deskrl.core.config import dump_config
from deskrl.core.runfolder import RunFolder
from deskrl.proto.v1 import replay_pb2, rollout_pb2


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no line is folded."""
    monkeypatch.setenv("COLUMNS", "220")


def status(process: ReplayProcess, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Exit status, and each role's line."""
    code = main(["status", str(process.config.folder)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    return code, {line.split("\u2502")[1].strip(): line for line in lines}


def test_roles_that_are_there_and_roles_that_are_not(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    client = process.client()
    ask = rollout_pb2.AcquireLeaseRequest(peer=rpc.peer("actor", "actor-0.4711"), request_id="ask")
    client.rollout.AcquireLease(ask, timeout=10)
    planned = replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "rank-0"))
    client.replay.PlanGroups(planned, timeout=10)
    code, told = status(process, capsys)
    assert code == 1
    for part in ("well", process.config.replay.address, rpc.VERSION):
        assert part in told["replay"]
    assert "well" in told["actor-0"] and "not well" not in told["actor-0"]
    assert "phase not begun, heard of" in told["learner"]
    assert "not well" in told["inference-0"]
    assert "deskrl inference CONFIG --index 0 starts it" in told["inference-0"]


def test_actors_that_replay_has_not_heard_of_are_named(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    code, told = status(process, capsys)
    assert code == 1
    assert "deskrl actor CONFIG --index 0 starts it" in told["actor-0"]


def test_faults_are_told(start_replay: StartReplay, capsys: pytest.CaptureFixture[str]) -> None:
    process = start_replay()
    client = process.client()
    client.plan("train/0")
    client.stream([begin(client.acquire()), fault()])
    main(["status", str(process.config.folder)])
    assert "faults over the run, each granted again: desktop lost 1" in capsys.readouterr().out


def test_without_replay_nothing_is_known_of_actors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replay_config(tmp_path)
    config.folder.mkdir()
    dump_config(config, config.folder / "config.json")
    assert main(["status", str(config.folder)]) == 1
    told = capsys.readouterr().out
    assert "deskrl replay CONFIG starts it" in told and "replay would know" in told


def test_a_run_that_has_finished_is_no_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replay_config(tmp_path)
    config.folder.mkdir()
    dump_config(config, config.folder / "config.json")
    RunFolder(config.folder).append_metrics("phase", phase="finished")
    assert main(["status", str(config.folder)]) == 0
    assert "has finished" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "top"])
def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("port", "told"), [(0, "serves no metrics; start the run with ports"), (None, "look with deskrl status RUN")]
)
def test_top_of_a_run_that_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], port: int | None, told: str
) -> None:
    config = replay_config(tmp_path, metrics_port=free_port() if port is None else port)
    config.folder.mkdir()
    dump_config(config, config.folder / "config.json")
    assert main(["top", str(config.folder)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and told in line
