"""Specification of `deskrl tasks prove` on a sample of deskrl's suite: tasks are solvable and not solved initially.

The sample needs only the applications that the quickstart installs; `tests/long/test_suite_proof.py` covers the suite.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.tasks.prove import main, prove
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_schema import SMOKE_TASKS, load_tasks
from deskrl.core.config import DesktopConfig, RunConfig, TasksConfig

CONFIG = RunConfig(desktop=DesktopConfig(num_envs=2))


SAMPLE = (*SMOKE_TASKS, "turn-up-the-volume", "two-colours", "move-to-a-folder", "print-in-colour", "restore-a-backup")


def test_tasks_of_the_suite_are_solvable_and_not_solved_initially() -> None:
    proofs = asyncio.run(prove(load_tasks(ids=SAMPLE), CONFIG, num_repeats=1))
    assert [proof.task_id for proof in proofs if not proof.holds] == []


def test_solutions_succeed_with_heavy_noise() -> None:
    tasks = load_tasks(ids=("press-and-submit", "rename-a-file", "replace-the-text"))
    config = CONFIG.model_copy(update={"tasks": TasksConfig(noise="heavy")})
    proofs = asyncio.run(prove(tasks, config, num_repeats=0))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []


def test_the_initial_screen_of_a_smoke_task_is_reproducible(tmp_path: Path) -> None:
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


def test_the_command_fails_for_tasks_that_are_solved_initially_unsolvable_or_without_a_solution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, "solved", "a\n", [{"kind": "finished"}])
    write_task(tmp_path, "unsolvable", "b\n", [{"kind": "finished"}])
    write_task(tmp_path, "unscripted", "b\n", [])
    assert main(RunConfig(), tmp_path, num_repeats=1) == 1
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "fails" in lines["solved"]
    assert "fails" in lines["unsolvable"]
    assert "no scripted solution" in lines["unscripted"]


def test_a_phase_that_takes_too_long_is_named() -> None:
    config = CONFIG.model_copy(update={"desktop": CONFIG.desktop.model_copy(update={"setup_timeout_s": 0.001})})
    (proof,) = asyncio.run(prove(load_tasks(ids=SAMPLE[:1]), config, num_repeats=0))
    assert proof.problems == ["TimeoutError: setup took longer than 0.001 s"]
