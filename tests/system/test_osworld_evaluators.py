"""Specification of OSWorld's own evaluators: they agree with the built-in ones on states of a real desktop.

Skipped if they are not installed (`deskrl evaluators install`).
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asset_cache_kit import osworld_cache_path

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.osworld_evaluators import evaluator_environment
from deskrl.actor.osworld_evaluators.evaluator_client import OSWorldEvaluatorClient, OSWorldEvaluatorError
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import (
    UnreadableStateError,
    evaluate_task,
    evaluate_with_osworld,
    has_builtin_evaluator,
    has_osworld_evaluator,
)
from deskrl.actor.tasks.requirements import unsupported_reasons
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig

needs_evaluators = pytest.mark.skipif(
    not evaluator_environment.installed_evaluators().metrics,
    reason="OSWorld's evaluators are not installed: deskrl evaluators install",
)
needs_packages = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

FILE = {"type": "vm_file", "path": "/home/user/note.txt", "dest": "note.txt"}
MISSING = {"type": "vm_file", "path": "/home/user/none.txt", "dest": "none.txt"}
PRINTED = {"type": "vm_command_line", "command": "cat /home/user/note.txt", "shell": True}
URL = "https://example.org/gold.txt"
GOLD = {"type": "cloud_file", "path": URL, "dest": "gold.txt"}


def rules(**values: Any) -> dict[str, Any]:
    return {"type": "rule", "rules": values}


def task(func: Any, result: Any, expected: Any, **more: Any) -> Task:
    evaluator = {"func": func, "result": result, "expected": expected, **more}
    return parse_task(json.dumps({"id": "t", "instruction": "Do it.", "evaluator": evaluator}).encode(), "t")


BOTH = {"func": ["check_include_exclude", "exact_match"], "result": [PRINTED, PRINTED]}
EVALUATED = {
    "holds a word": task("check_include_exclude", PRINTED, rules(include=["alpha"], exclude=["gamma"])),
    "lacks a word": task("check_include_exclude", PRINTED, rules(include=["gamma"], exclude=[])),
    "is exactly": task("exact_match", PRINTED, rules(expected="alpha\nbeta\n")),
    "is not exactly": task("exact_match", PRINTED, rules(expected="alpha")),
    "is one of": task("match_in_list", PRINTED, rules(expected=["x", "alpha\nbeta\n"])),
    "is none of": task("match_in_list", PRINTED, rules(expected=["x"])),
    "contains": task("file_contains", FILE, rules(expected=["alpha", "beta"])),
    "does not contain": task("file_contains", FILE, rules(expected=["alpha", "gamma"])),
    "lines match": task("check_list", FILE, rules(expect=["^al"], unexpect=["^ga"])),
    "a line must not match": task("check_list", FILE, rules(expect=["^al"], unexpect=["^be"])),
    "equals the gold file": task("compare_text_file", FILE, GOLD),
    "no file": task("compare_text_file", MISSING, GOLD),
    "both, one fails": task(
        BOTH["func"], BOTH["result"], [rules(include=["alpha"], exclude=[]), rules(expected="x")], conj="and"
    ),
    "either holds": task(
        BOTH["func"], BOTH["result"], [rules(include=["gamma"], exclude=[]), rules(expected="alpha\nbeta\n")], conj="or"
    ),
}


@pytest.fixture(scope="module")
def desktop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedDesktop, asyncio.Runner]]:
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        osworld_cache_path("t", URL).parent.mkdir(parents=True)
        osworld_cache_path("t", URL).write_text("alpha\nbeta\n")
        desktop = EmbeddedDesktop(DesktopConfig(width=640, height=480), "d", tmp_path_factory.mktemp("o"))
        try:
            runner.run(desktop.start())
            runner.run(desktop.write_file("~/note.txt", b"alpha\nbeta\n"))
            runner.run(desktop.end_setup())
            yield desktop, runner
        finally:
            runner.run(desktop.close())


@needs_packages
@needs_evaluators
@pytest.mark.parametrize("name", EVALUATED)
def test_osworld_and_built_in_evaluators_agree(desktop: tuple[EmbeddedDesktop, asyncio.Runner], name: str) -> None:
    guest, runner = desktop
    evaluated = EVALUATED[name]
    assert has_builtin_evaluator(evaluated) and has_osworld_evaluator(evaluated)
    built_in = runner.run(evaluate_task(guest, evaluated, None))
    osworld = runner.run(evaluate_with_osworld(guest, evaluated, {}))
    assert (built_in.reward, osworld.reward) == (built_in.reward,) * 2
    assert osworld.evidence["official"] is True


@needs_packages
@needs_evaluators
def test_a_task_without_built_in_evaluator_is_evaluated_by_osworlds(
    desktop: tuple[EmbeddedDesktop, asyncio.Runner],
) -> None:
    guest, runner = desktop
    save_step = {"type": "execute", "parameters": {"command": ["cat", "/home/user/note.txt"], "stdout": "saved.txt"}}
    saved_output = task(
        "check_list", {"type": "cache_file", "path": "saved.txt"}, rules(expect=["^beta$"]), postconfig=[save_step]
    )
    assert not has_builtin_evaluator(saved_output) and unsupported_reasons(saved_output) == []
    assert runner.run(evaluate_task(guest, saved_output, None)).reward == 1.0


@needs_packages
@needs_evaluators
def test_an_unreachable_guest_server_is_a_fault_and_not_a_reward(
    desktop: tuple[EmbeddedDesktop, asyncio.Runner],
) -> None:
    _, runner = desktop
    evaluated = json.loads(EVALUATED["no file"].data)

    async def evaluate() -> None:
        evaluators = OSWorldEvaluatorClient()
        try:
            with pytest.raises(OSWorldEvaluatorError, match="Connection"):
                await evaluators.evaluate(
                    evaluated, Path("/nonexistent/guest.sock"), {URL: osworld_cache_path("t", URL)}, {}
                )
        finally:
            await evaluators.close()

    runner.run(evaluate())


@needs_packages
@needs_evaluators
def test_an_evaluator_that_raises_could_not_read_the_state(desktop: tuple[EmbeddedDesktop, asyncio.Runner]) -> None:
    guest, runner = desktop
    with pytest.raises(UnreadableStateError, match="KeyError: 'expected'"):
        runner.run(evaluate_with_osworld(guest, task("exact_match", PRINTED, rules(wanted="x")), {}))


def test_a_process_that_exits_without_a_response_is_a_fault_and_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def evaluate() -> None:
        evaluators = OSWorldEvaluatorClient()
        monkeypatch.setattr(
            "deskrl.actor.osworld_evaluators.evaluator_client.interpreter_path", lambda: Path("/bin/true")
        )
        with pytest.raises(OSWorldEvaluatorError, match="exited without a response"):
            await evaluators.evaluate({}, ("127.0.0.1", 1), {}, {})
        monkeypatch.setattr(
            "deskrl.actor.osworld_evaluators.evaluator_client.interpreter_path", lambda: Path(sys.executable)
        )
        with pytest.raises(OSWorldEvaluatorError, match="KeyError: 'evaluator'"):
            await evaluators.evaluate({}, ("127.0.0.1", 1), {}, {})
        await evaluators.close()

    asyncio.run(evaluate())


def _use_evaluator_script(monkeypatch: pytest.MonkeyPatch, path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr("deskrl.actor.osworld_evaluators.evaluator_client.interpreter_path", lambda: path)


def test_a_process_that_closes_its_pipes_without_a_response_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed_in_turn = "read request; exec <&-; sleep 0.3; exec >&-; exec sleep 60"
    _use_evaluator_script(monkeypatch, tmp_path / "evaluator", closed_in_turn)

    async def evaluate() -> None:
        with pytest.raises(OSWorldEvaluatorError, match="exited without a response"):
            await OSWorldEvaluatorClient().evaluate({}, ("127.0.0.1", 1), {}, {})

    asyncio.run(evaluate())


def test_a_process_that_exits_while_idle_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exits_after_one_response = "read request; echo '{\"reward\": 0.5}'"
    _use_evaluator_script(monkeypatch, tmp_path / "evaluator", exits_after_one_response)

    async def evaluate() -> None:
        evaluators = OSWorldEvaluatorClient()
        for _ in range(2):
            assert (await evaluators.evaluate({}, ("127.0.0.1", 1), {}, {})).reward == 0.5
            await evaluators._idle[0].wait()
        await evaluators.close()

    asyncio.run(evaluate())


def test_a_task_that_needs_evaluators_that_are_not_installed_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DESKRL_EVALUATORS", "/nonexistent")
    evaluator_environment.installed_evaluators.cache_clear()
    try:
        assert unsupported_reasons(task("compare_table", FILE, rules())) == ["metric compare_table is not built in"]
    finally:
        evaluator_environment.installed_evaluators.cache_clear()
