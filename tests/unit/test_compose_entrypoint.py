"""Compose's entrypoint: a role that rejects its input ends with status 0, so that Docker does not restart it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml").read_text())["services"]
ROLES = ("replay", "inference", "learner", "actor")


def start(folder: Path, program: str) -> subprocess.Popen[str]:
    """Start the entrypoint of a role as compose does, with a program in place of deskrl."""
    (folder / "deskrl").write_text(f"#!/bin/sh\n{program}\n")
    (folder / "deskrl").chmod(0o755)
    command = [word.replace("$$", "$") for word in SERVICES["replay"]["entrypoint"]]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, "replay", "a b"], env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (2, 0), (3, 3), (143, 143)])
def test_only_the_status_of_rejected_input_is_changed(tmp_path: Path, status: int, expected: int) -> None:
    process = start(tmp_path, f'printf "%s|" "$@"; exit {status}')
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (expected, "replay|a b|")
    assert ("is not restarted" in errors) == (status == 2)


@pytest.mark.parametrize("status", [0, 5])
def test_a_role_ends_in_good_order_when_its_container_is_stopped(tmp_path: Path, status: int) -> None:
    program = f"trap 'sleep 0.2; echo saved; exit {status}' TERM; echo ready; while :; do sleep 0.05; done"
    process = start(tmp_path, program)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "saved\n")


def test_a_killed_role_is_restarted(tmp_path: Path) -> None:
    process = start(tmp_path, "kill -KILL $$")
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


def test_all_roles_have_the_entrypoint_and_the_preparation_keeps_its_status() -> None:
    assert all(SERVICES[role]["entrypoint"] == SERVICES["replay"]["entrypoint"] for role in ROLES)
    assert SERVICES["prepare"]["entrypoint"] == ["deskrl"]
