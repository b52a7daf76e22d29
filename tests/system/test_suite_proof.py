"""deskrl's own suite on real desktops: tasks can be solved, none is solved already, and `prove` tells when not.

A sample of it, by the applications that the quickstart installs; `tests/long/test_suite_whole.py` proves all of it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.tasks.files import SMOKE_TASKS, load_tasks, parse_task
from deskrl.actor.tasks.noise import make_noisy
from deskrl.actor.tasks.prove import main, prove
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.core.config import DesktopConfig, RunConfig

CONFIG = RunConfig(desktop=DesktopConfig(num_envs=2))


SAMPLE = (*SMOKE_TASKS, "turn-up-the-volume", "two-colours", "move-to-a-folder", "print-in-colour", "restore-a-backup")


def test_tasks_of_the_suite_can_be_solved_and_are_not_solved_already() -> None:
    proofs = asyncio.run(prove(load_tasks(ids=SAMPLE), CONFIG, num_times=1))
    assert [proof.task_id for proof in proofs if not proof.holds] == []


def test_solutions_hold_under_the_heaviest_noise() -> None:
    plain = load_tasks(ids=("press-and-submit", "rename-a-file", "replace-the-text"))
    noisy = [parse_task(make_noisy(task, "heavy"), task.id) for task in plain]
    proofs = asyncio.run(prove(noisy, CONFIG, num_times=0))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []


def test_a_smoke_task_begins_with_the_same_screen_each_time(tmp_path: Path) -> None:
    async def first_screens() -> list[Image.Image]:
        desktop = EmbeddedDesktop(CONFIG.desktop, "d", tmp_path)
        screens: list[Image.Image] = []
        for task in load_tasks(ids=SMOKE_TASKS):
            await desktop.reset()
            await setup_task(desktop, task, seed=len(screens))
            screens.append(await desktop.settle())
        await desktop.close()
        return screens

    assert asyncio.run(first_screens()) == asyncio.run(first_screens())


def write_task(suite: Path, name: str, wanted: str, solution: list[dict[str, Any]]) -> None:
    task = {
        "id": name,
        "instruction": "-",
        "evaluator": {
            "func": "exact_match",
            "result": {"type": "vm_command_line", "command": ["echo", "a"]},
            "expected": {"type": "rule", "rules": {"expected": wanted}},
        },
        "deskrl": {"solution": [{"thought": "Done.", "action": action} for action in solution]},
    }
    file = suite / "examples" / "os" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(task))


def test_a_task_that_is_solved_already_or_never_or_not_scripted_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, "already", "a\n", [{"kind": "finished"}])
    write_task(tmp_path, "never", "b\n", [{"kind": "finished"}])
    write_task(tmp_path, "unscripted", "b\n", [])
    assert main(tmp_path, num_times=1) == 1
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "fails" in lines["already"]
    assert "fails" in lines["never"]
    assert "there is no scripted solution" in lines["unscripted"]
