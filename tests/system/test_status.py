"""`deskrl status` and `deskrl top` of runs with missing roles; test_run.py tests them on a healthy run."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from ports_kit import free_port
from replay_kit import ReplayProcess, StartReplay, begin, fault, replay_config

from deskrl.cli.main import main
from deskrl.core import rpc
from deskrl.core.config import dump_config
from deskrl.core.run_dir import RunDir
from deskrl.proto.v1 import replay_pb2, rollout_pb2


def status(process: ReplayProcess, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Return the exit status, and the row of each role."""
    code = main(["status", str(process.config.run_dir)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    return code, {line.split("\u2502")[1].strip(): line for line in lines}


def test_reachable_roles_are_healthy_and_the_others_have_a_hint(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    client = process.client()
    ask = rollout_pb2.AcquireLeaseRequest(peer=rpc.peer("actor", "actor-0.4711"), request_id="ask")
    client.rollout.AcquireLease(ask, timeout=60)
    planned = replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "rank-0"))
    client.replay.PlanGroups(planned, timeout=60)
    code, rows = status(process, capsys)
    assert code == 1
    for part in ("healthy", process.config.replay.address, rpc.VERSION):
        assert part in rows["replay"]
    assert "healthy" in rows["actor-0"] and "unhealthy" not in rows["actor-0"]
    assert "phase not started, last call" in rows["learner"]
    assert "unhealthy" in rows["inference-0"]
    assert "start it with: deskrl inference CONFIG --index 0" in rows["inference-0"]


def test_roles_that_a_supervisor_is_starting_are_not_to_be_started_by_hand(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    with open(RunDir(process.config.run_dir).lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, rows = status(process, capsys)
    assert "not reachable; its supervisor starts it, see `logs` in the run directory" in rows["inference-0"]


def test_an_actor_that_has_not_called_replay_is_unhealthy(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    code, rows = status(process, capsys)
    assert code == 1
    assert "start it with: deskrl actor CONFIG --index 0" in rows["actor-0"]


def test_faults_are_counted_by_kind(start_replay: StartReplay, capsys: pytest.CaptureFixture[str]) -> None:
    process = start_replay()
    client = process.client()
    client.plan("train/0")
    client.stream([begin(client.acquire()), fault()])
    main(["status", str(process.config.run_dir)])
    assert "faults so far, whose rollouts were granted again: desktop lost 1" in capsys.readouterr().out


def test_desktops_that_do_not_start_make_their_actor_unhealthy(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    report = rollout_pb2.ExtendLeasesRequest(
        peer=rpc.peer("actor", "actor-0.4711"), num_desktops_set_aside=1, start_error="no display"
    )
    process.client().rollout.ExtendLeases(report, timeout=60)
    code, rows = status(process, capsys)
    assert code == 1 and "unhealthy" in rows["actor-0"]
    assert "1 desktop does not start and is retried: no display" in rows["actor-0"]


def test_tasks_whose_desktops_are_lost_after_an_action_are_listed(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_replay()
    client = process.client()
    client.plan("train/0")
    lease = client.acquire()
    client.stream([begin(lease), fault("closed", rollout_pb2.FAULT_KIND_CONNECTION_LOST)])
    main(["status", str(process.config.run_dir)])
    text = f"lost their desktop after the policy's first action: {lease.rollout.task_id} 1 of 1"
    assert text in capsys.readouterr().out


def test_without_replay_the_health_of_actors_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replay_config(tmp_path)
    config.run_dir.mkdir()
    dump_config(config, config.run_dir / "config.json")
    assert main(["status", str(config.run_dir)]) == 1
    output = capsys.readouterr().out
    assert "start it with: deskrl replay CONFIG" in output and "unknown without replay" in output


def test_a_finished_run_without_roles_has_exit_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replay_config(tmp_path)
    config.run_dir.mkdir()
    dump_config(config, config.run_dir / "config.json")
    RunDir(config.run_dir).append_metrics("phase", phase="finished")
    assert main(["status", str(config.run_dir)]) == 0
    assert "has finished" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "top"])
def test_a_folder_without_a_run_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "config.json: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("port", "message"),
    [(0, "serves no metrics (hint: start the run with metrics ports"), (None, "no role of the run is reachable")],
)
def test_top_rejects_a_run_without_reachable_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], port: int | None, message: str
) -> None:
    config = replay_config(tmp_path, metrics_port=free_port() if port is None else port)
    config.run_dir.mkdir()
    dump_config(config, config.run_dir / "config.json")
    assert main(["top", str(config.run_dir)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line


def test_servers_of_another_run_are_not_shown_as_those_of_this_run(
    start_replay: StartReplay, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a = start_replay(metrics_port=free_port())
    b = a.config.model_copy(update={"runs": tmp_path, "name": "b"})
    b.run_dir.mkdir()
    dump_config(b, b.run_dir / "config.json")
    assert main(["status", str(b.run_dir)]) == 1
    output = capsys.readouterr().out
    assert f"this server belongs to another run: {a.config.name} ({a.config.run_dir}), not b" in output
    assert "1 actors" in output and "unknown without replay" in output
    assert main(["top", str(b.run_dir)]) == 2
    assert "processes of another run serve there" in capsys.readouterr().err
    assert main(["actor", str(b.run_dir / "config.json")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"deskrl: {a.config.replay.address}: this server belongs to another run"), line
    assert "healthy" in status(a, capsys)[1]["replay"]
