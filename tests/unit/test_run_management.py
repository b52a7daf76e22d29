"""`deskrl runs`: runs of a folder are listed with their state, stopped in good order, and deleted safely."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deskrl.cli.main import main
from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_control import Holder, find_holder
from deskrl.launch.run_state import record_failure

HOLD = """
import fcntl, signal, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
def stop(number, frame):
    open(sys.argv[2], "w").write("stopped by signal %d" % number)
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
print("held", flush=True)
while True:
    time.sleep(60)
"""
"""Program that holds a lock, as a supervisor does, and notes which signal ended it."""

Hold = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Return a function that starts a process which holds a lock file."""
    processes: list[subprocess.Popen[str]] = []

    def start(lock: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(lock), str(tmp_path / "end")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def make_run(runs: Path, name: str, state: str | None = "running", num_updates: int = 0) -> RunDir:
    folder = RunDir(runs / name)
    folder.create()
    write_json(folder.config, {"deskrl_version": "1.2.3"})
    if state is not None:
        write_json(folder.supervisor, {"state": state, "started_unix_s": 1e9})
    if num_updates:
        folder.append_metrics("phase", phase="training")
    for number in range(1, num_updates + 1):
        folder.append_metrics("update", update=number, success_rate=number / 10)
    return folder


def make_evaluation(runs: Path, name: str, rate: tuple[int, int] | None) -> RunDir:
    folder = make_run(runs, name, state=None)
    write_json(folder.root / "evaluation.json", {"sets": {}})
    if rate is not None:
        counts = {"num_successes": rate[0], "num_episodes": rate[1]}
        write_json(folder.results / "evaluation.json", {"all": counts})
    return folder


def listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["runs", "list", str(runs), "--json"]) == 0
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)}


def test_each_run_is_listed_with_its_state_and_progress(
    tmp_path: Path, hold: Hold, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "finished", "finished", 3)
    make_run(tmp_path, "interrupted", "running", 2)
    record_failure(make_run(tmp_path, "failed", "running", 1))
    hold(make_run(tmp_path, "running", "running", 5).lock)
    hold(make_run(tmp_path, "starting").lock)
    hold(make_run(tmp_path, "unsupervised", None, 1).replay / "lock")
    make_evaluation(tmp_path, "evaluated", (3, 4))
    make_evaluation(tmp_path, "half-evaluated", None)
    (tmp_path / "damaged").mkdir()
    make_run(tmp_path, "damaged").supervisor.write_bytes(b"\xff{")
    runs = listed(tmp_path, capsys)
    assert {name: run["state"] for name, run in runs.items()} == {
        "finished": "finished",
        "interrupted": "interrupted",
        "failed": "failed",
        "running": "running",
        "starting": "starting",
        "unsupervised": "running",
        "evaluated": "finished",
        "half-evaluated": "interrupted",
        "damaged": "failed",
    }
    assert {name for name, run in runs.items() if run["kind"] == "evaluation"} == {"evaluated", "half-evaluated"}
    assert runs["finished"]["updates"] == 3 and runs["finished"]["success_rate"] == pytest.approx(0.3)
    assert runs["evaluated"]["updates"] is None and runs["evaluated"]["success_rate"] == 0.75
    assert runs["finished"]["version"] == "1.2.3"
    assert isinstance(runs["finished"]["num_bytes"], int) and runs["finished"]["num_bytes"] > 0


def test_the_runs_of_a_sweep_are_listed_and_other_directories_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "sweep", "one-s0")
    write_json(tmp_path / "sweep" / "sweep.json", {})
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    assert set(listed(tmp_path, capsys)) == {"sweep/one-s0"}


def test_a_piped_list_has_one_line_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-run-" + "x" * 150
    make_run(tmp_path, name, "finished", 2)
    assert main(["runs", "list", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert len(lines) == 1 and all(word in lines[0] for word in ("training", "finished", "20%", "1.2.3"))


def test_a_folder_without_runs_is_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(tmp_path, capsys) == {}


def test_stop_interrupts_the_supervisor_and_waits_for_its_end(tmp_path: Path, hold: Hold) -> None:
    folder = make_run(tmp_path, "one", "running", 1)
    process = hold(folder.lock)
    assert find_holder(folder) == Holder(process.pid)
    assert main(["runs", "stop", str(folder.root)]) == 0
    assert (tmp_path / "end").read_text() == "stopped by signal 2"
    assert find_holder(folder) is None


def test_delete_removes_a_run_and_reports_what_it_freed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "one", "finished", 1)
    (folder.checkpoints / "weights").write_bytes(bytes(10**6))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (folder.root / "link").symlink_to(outside)
    assert main(["runs", "delete", str(folder.root), "--yes"]) == 0
    found = re.search(r": (\d+) bytes freed", capsys.readouterr().out)
    assert found is not None and int(found[1]) >= 10**6
    assert not folder.root.exists() and (outside / "kept").exists()


@pytest.mark.parametrize(("answer", "is_deleted"), [("y", True), ("yes", True), ("", False), ("n", False)])
def test_delete_asks_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_deleted: bool
) -> None:
    folder = make_run(tmp_path, "one")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert main(["runs", "delete", str(folder.root)]) == (0 if is_deleted else 1)
    assert folder.root.exists() != is_deleted


def expect_rejection(capsys: pytest.CaptureFixture[str], *arguments: str, message: str) -> None:
    assert main(["runs", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and "(hint: " in captured.err


def test_a_running_run_is_not_deleted(tmp_path: Path, hold: Hold, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    hold(one.lock)
    hold(two.replay / "lock")
    expect_rejection(capsys, "delete", str(one.root), "--yes", message="is running")
    expect_rejection(capsys, "delete", str(two.root), "--yes", message="its replay service is running")
    assert one.config.exists() and two.config.exists()


def test_only_run_directories_are_deleted_or_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "one")
    (tmp_path / "link").symlink_to(folder.root)
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "config.json", {})
    (tmp_path / "sweep").mkdir()
    write_json(tmp_path / "sweep" / "sweep.json", {})
    (tmp_path / "file").touch()
    for command in (["delete", "--yes"], ["stop"]):
        for name, message in [
            ("link", "is a link"),
            ("other", "contains no run"),
            ("sweep", "is a sweep"),
            ("missing", "not found"),
            ("file", "not found"),
            (".", "contains no run"),
        ]:
            expect_rejection(capsys, *command, str(tmp_path / name), message=message)
    assert folder.config.exists() and (tmp_path / "other" / "config.json").exists()
    expect_rejection(capsys, "stop", str(folder.root), message="is not running")
    expect_rejection(capsys, "delete", str(folder.root), message="not confirmed")
    expect_rejection(capsys, "list", str(tmp_path / "missing"), message="not found")
    expect_rejection(capsys, "list", str(tmp_path / "file"), message="is not a directory")


def test_a_run_of_another_machine_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock that /proc/locks does not list is one of another machine or process namespace."""
    folder = make_run(tmp_path, "one")
    (tmp_path / "locks").touch()
    monkeypatch.setattr("deskrl.launch.run_control._LOCKS", tmp_path / "locks")
    with open(folder.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expect_rejection(capsys, "stop", str(folder.root), message="on another machine or in another container")
