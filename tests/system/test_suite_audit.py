"""Specification of `deskrl tasks audit`: cheats are not rewarded by deskrl's suite, and are found where they are.

The sample has cheats of every kind; `tests/long/test_suite_audit.py` runs all cheats against all tasks.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.desktops.embedded import EmbeddedProvider
from deskrl.actor.tasks.audit import audit, cheat_description, cheat_names, main
from deskrl.actor.tasks.task_filter import unmet_requirements
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig

CONFIG = RunConfig(desktop=DesktopConfig(num_envs=3))

SAMPLE = {
    "press-and-submit": ("developer-tools", "titles-after-the-end", "forged-page"),
    "fill-the-disc": ("painted-screen", "links-to-memory"),
    "write-a-word": ("pipes", "huge-files"),
}
"""Cheats by task; each task is judged by another kind of evidence. The long tier has all tasks and all cheats."""


@pytest.mark.parametrize("task_id", SAMPLE)
def test_cheats_are_not_rewarded(task_id: str) -> None:
    tasks = load_tasks(ids=[task_id])
    if unmet := unmet_requirements(tasks[0], EmbeddedProvider()):
        pytest.skip("; ".join(unmet))
    attempts = asyncio.run(audit(tasks, CONFIG, SAMPLE[task_id]))
    assert [attempt for attempt in attempts if attempt.verdict != "held"] == []


FORGEABLE = {
    "title": ("titles-once", "wmctrl -l", "The end"),
    "tool": ("fake-tools", "~/bin/report", "The end"),
}
"""Evaluators that a cheat can forge: cheat, command and expected output."""


@pytest.fixture
def forgeable_list(tmp_path: Path) -> Path:
    """Return a task list whose evaluators can be forged."""
    for name, (_, command, expected) in FORGEABLE.items():
        task: dict[str, Any] = {
            "id": name,
            "instruction": "-",
            "config": [
                {"type": "launch", "parameters": {"command": ["xterm", "-T", "Start"]}},
                {
                    "type": "execute_with_verification",
                    "parameters": {"command": ["true"], "verification": {"window_exists": "Start"}},
                },
            ],
            "evaluator": {
                "func": "check_include_exclude",
                "result": {"type": "vm_command_line", "command": command, "shell": True},
                "expected": {"type": "rule", "rules": {"include": [expected]}},
            },
        }
        file = tmp_path / "examples" / "os" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(task))
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"os": list(FORGEABLE)}))
    return path


def test_the_command_fails_and_names_the_cheats_that_are_rewarded(
    forgeable_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheats = ["nothing", *(cheat for cheat, _, _ in FORGEABLE.values())]
    assert main(RunConfig(), list_path=forgeable_list, cheats=cheats) == 1
    printed = capsys.readouterr().out
    for name, (cheat, _, _) in FORGEABLE.items():
        assert f"rewarded: {name}, {cheat}:" in printed
    assert "2 rewarded" in printed


def test_every_cheat_has_a_description() -> None:
    assert all(cheat_description(name).endswith(".") for name in cheat_names())
