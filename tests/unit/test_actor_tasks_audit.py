"""Specification of what cheats know of a task, and of which getters need running applications."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from deskrl.actor.tasks.audit import claims_of
from deskrl.actor.tasks.evaluators import needs_session
from deskrl.actor.tasks.task_schema import load_tasks, parse_task


def evaluator(result: dict[str, Any], rules: dict[str, Any]) -> Any:
    record = {"func": "exact_match", "result": result, "expected": {"type": "rule", "rules": rules}}
    return parse_task(json.dumps({"id": "t", "instruction": "-", "evaluator": record}).encode(), "t")


def test_claims_contain_what_the_evaluator_reads_and_runs() -> None:
    command = {"type": "vm_command_line", "command": "cd ~/Documents && /usr/bin/cat a.txt | wc -l", "shell": True}
    claims = claims_of(evaluator(command, {"expected": "two\nlines"}))
    assert claims.texts == ("two\nlines",)
    assert claims.text == "two"
    assert set(claims.paths) == {"~/Documents", "~/Documents/a.txt"}
    assert {"cat", "wc", "python3"} <= set(claims.tools)


def test_claims_contain_a_text_that_matches_the_pattern() -> None:
    for task in load_tasks():
        for check in task.evaluator.checks:
            if check.func == "match_pattern" and check.expected is not None:
                pattern = check.expected.parameters["rules"]["pattern"]
                assert re.fullmatch(pattern, claims_of(task).text), task.id


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"type": "vm_file", "path": "~/a.txt"}, False),
        ({"type": "vm_command_line", "command": ["cat", "a.txt"]}, False),
        ({"type": "vm_command_line", "command": ["wmctrl", "-l"]}, True),
        ({"type": "vm_command_line", "command": "ps aux | grep soffice", "shell": True}, True),
        ({"type": "vm_command_line", "command": "cat a.txt", "session": True}, True),
        ({"type": "vm_command_line", "command": "cat ps", "session": False}, False),
        ({"type": "setup_window_title", "executable": ["mupdf"], "keys": ["c"]}, True),
    ],
)
def test_only_getters_that_read_windows_or_processes_need_running_applications(
    item: dict[str, Any], expected: bool
) -> None:
    [check] = evaluator(item, {"expected": ""}).evaluator.checks
    assert check.result is not None
    assert needs_session(check.result) is expected


def test_no_task_of_the_suite_is_judged_by_what_a_program_can_write_about_itself() -> None:
    for task in load_tasks():
        commands = [str(item.parameters.get("command", "")) for check in task.evaluator.checks for item in check.items]
        assert not any(word in command for command in commands for word in ("wmctrl", "xdotool", "xprop")), task.id
