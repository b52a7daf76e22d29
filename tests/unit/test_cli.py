"""The command line: renamed commands, and errors that are reported in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ports_kit import free_address

from deskrl.cli.arguments import join_overrides
from deskrl.cli.main import main
from deskrl.core.config import RunConfig, dump_config

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


def test_an_error_is_written_to_standard_error_at_once(tmp_path: Path) -> None:
    """Ranks that fail together write unbuffered to one pipe: a line written in parts would mix with another one."""
    missing = tmp_path / "missing.toml"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # preserves the boundaries of writes
    with ours, theirs:
        command = [sys.executable, "-u", "-m", "deskrl.cli.main", "up", str(missing)]
        assert subprocess.run(command, stderr=theirs, timeout=60).returncode == 2
        first_write = ours.recv(65536).decode()
    assert first_write.startswith(f"deskrl: {missing}: not found (hint: ")
    assert first_write.endswith("\n")
    assert first_write.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("replay-run", "renamed to deskrl reproduce"),
        ("learn-again", "renamed to deskrl reproduce-updates"),
        ("prove-checkpoint", "renamed to deskrl verify-checkpoint"),
        ("model", "renamed to deskrl build-model"),
        ("explian", "did you mean deskrl explain"),
        ("fly", "see deskrl --help"),
    ],
)
def test_an_unknown_command_is_rejected_with_its_new_name_or_a_similar_one(
    capsys: pytest.CaptureFixture[str], command: str, hint: str
) -> None:
    assert main([command, "runs/mine"]) == 2
    assert capsys.readouterr().err == f"deskrl: {command}: unknown command (hint: {hint})\n"


def test_every_new_name_of_a_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("reproduce", "reproduce-updates", "verify-checkpoint", "build-model"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: deskrl {command}" in capsys.readouterr().out


def test_a_table_in_a_pipe_has_every_cell_on_one_line(tmp_path: Path) -> None:
    runs = ["a", "b"]
    for name in runs:
        root = tmp_path / f"an-evaluation-with-a-name-that-is-rather-long-{name}"
        (root / "results" / "task_results").mkdir(parents=True)
        addresses = {section: {"address": free_address()} for section in ("replay", "inference")}
        dump_config(RunConfig.model_validate(addresses), root / "config.json")
        for task in ("bookmark-the-page-that-is-open-and-close-the-browser", "x"):
            record = {"task_id": task, "application": "multi_apps_and_a_long_name", "infeasible": False}
            episode: dict[str, Any] = {key: [] for key in ("timings_ms", "versions", "actions", "screenshots")}
            episode |= {"episode_id": "e", "seed": 0, "reward": 1.0, "termination": "finished", "num_steps": 1}
            episode |= {"duration_s": 1.0, "fault": ""}
            text = json.dumps({**record, "episodes": [episode]})
            (root / "results" / "task_results" / f"{task}.json").write_text(text)
    names = [f"an-evaluation-with-a-name-that-is-rather-long-{name}" for name in runs]
    environment = {**os.environ, "COLUMNS": "80"}  # as programs with readline export it to their children
    command = [sys.executable, "-m", "deskrl.cli.main"]
    for arguments, words in (
        (
            ["compare", *(str(tmp_path / name) for name in names)],
            [*names, "multi_apps_and_a_long_name"],
        ),
        (["explain", str(SMOKE)], ["optimizer steps per update"]),
        (["status", str(tmp_path / names[0])], ["not reachable; start it with: deskrl inference CONFIG --index 0"]),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)
        for word in words:
            assert any(word in line for line in done.stdout.splitlines()), (word, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "joined"),
    [
        (["tasks", "prove", "--desktop.provider", "mine:Desk"], ["tasks", "prove", "--desktop.provider=mine:Desk"]),
        (["up", "--learner.grpo.num_updates", "-1", "run.toml"], ["up", "--learner.grpo.num_updates=-1", "run.toml"]),
        (["up", "--seed", "3", "--runs=r", "run.toml"], ["up", "--seed=3", "--runs=r", "run.toml"]),
        (["up", "run.toml", "--desktop.width", "--seed"], ["up", "run.toml", "--desktop.width", "--seed"]),
        (["eval", "--tasks", "a.json", "b.json"], ["eval", "--tasks", "a.json", "b.json"]),
    ],
)
def test_the_value_of_an_override_is_no_positional_argument(arguments: list[str], joined: list[str]) -> None:
    assert join_overrides(arguments) == joined


def test_tasks_are_proven_on_the_desktops_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    durations = ("reset_median_s", "action_median_s", "evaluation_min_s", "evaluation_max_s")
    fast = [f"--desktop.simulated.{name}=0.001" for name in durations]
    assert main(["tasks", "prove", "type-amber", "--desktop.provider", "simulated", *fast]) == 0
    assert "type-amber" in capsys.readouterr().out


def test_declaring_the_commands_loads_no_role() -> None:
    """Roles take a second or more to import, and a machine may lack the packages of some of them."""
    program = "import sys; from deskrl.cli.main import build_parser; build_parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    roles = ("deskrl.actor", "deskrl.inference", "deskrl.learner", "deskrl.replay")
    assert [name for name in modules if name.startswith(roles)] == []
