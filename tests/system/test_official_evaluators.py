"""OSWorld's own evaluators, in their process, agree with the built-in ones about states of a real desktop.

Skipped where they are not installed (`deskrl evaluators install`).
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.official import environment
from deskrl.actor.official.client import OfficialEvaluators, OfficialFault
from deskrl.actor.tasks.assets import osworld_path
from deskrl.actor.tasks.evaluators import EvaluatorError, evaluate_task, is_built_in, is_official, judge_officially
from deskrl.actor.tasks.files import Task, parse_task
from deskrl.actor.tasks.needs import unsupported
from deskrl.core.config import DesktopConfig

needs_evaluators = pytest.mark.skipif(
    not environment.provided().metrics, reason="OSWorld's evaluators are not installed: deskrl evaluators install"
)
needs_packages = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

FILE = {"type": "vm_file", "path": "/home/user/note.txt", "dest": "note.txt"}
ABSENT = {"type": "vm_file", "path": "/home/user/none.txt", "dest": "none.txt"}
PRINTED = {"type": "vm_command_line", "command": "cat /home/user/note.txt", "shell": True}
URL = "https://example.org/gold.txt"
GOLD = {"type": "cloud_file", "path": URL, "dest": "gold.txt"}


def rules(**values: Any) -> dict[str, Any]:
    return {"type": "rule", "rules": values}


def task(func: Any, result: Any, expected: Any, **more: Any) -> Task:
    evaluator = {"func": func, "result": result, "expected": expected, **more}
    return parse_task(json.dumps({"id": "t", "instruction": "Do it.", "evaluator": evaluator}).encode(), "t")


BOTH = {"func": ["check_include_exclude", "exact_match"], "result": [PRINTED, PRINTED]}
JUDGED = {
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
    "no file": task("compare_text_file", ABSENT, GOLD),
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
        osworld_path("t", URL).parent.mkdir(parents=True)
        osworld_path("t", URL).write_text("alpha\nbeta\n")
        desktop = EmbeddedDesktop(DesktopConfig(width=640, height=480), "d", tmp_path_factory.mktemp("o"))
        try:
            runner.run(desktop.start())
            runner.run(desktop.write_file("~/note.txt", b"alpha\nbeta\n"))
            yield desktop, runner
        finally:
            runner.run(desktop.close())


@needs_packages
@needs_evaluators
@pytest.mark.parametrize("name", JUDGED)
def test_official_and_built_in_evaluators_agree(desktop: tuple[EmbeddedDesktop, asyncio.Runner], name: str) -> None:
    on, runner = desktop
    judged = JUDGED[name]
    assert is_built_in(judged) and is_official(judged)
    built_in = runner.run(evaluate_task(on, judged, None))
    official = runner.run(judge_officially(on, judged, {}))
    assert (built_in.reward, official.reward) == (built_in.reward,) * 2
    assert official.evidence["official"] is True


@needs_packages
@needs_evaluators
def test_a_task_beyond_the_built_in_evaluators_is_judged_by_the_official_ones(
    desktop: tuple[EmbeddedDesktop, asyncio.Runner],
) -> None:
    on, runner = desktop
    kept = {"type": "execute", "parameters": {"command": ["cat", "/home/user/note.txt"], "stdout": "kept.txt"}}
    of_output = task(
        "check_list", {"type": "cache_file", "path": "kept.txt"}, rules(expect=["^beta$"]), postconfig=[kept]
    )
    assert not is_built_in(of_output) and unsupported(of_output) == []
    assert runner.run(evaluate_task(on, of_output, None)).reward == 1.0


@needs_packages
@needs_evaluators
def test_a_guest_that_cannot_be_reached_is_a_fault_and_no_reward(
    desktop: tuple[EmbeddedDesktop, asyncio.Runner],
) -> None:
    _, runner = desktop
    judged = json.loads(JUDGED["no file"].data)

    async def judge() -> None:
        evaluators = OfficialEvaluators()
        try:
            with pytest.raises(OfficialFault, match="Connection"):
                await evaluators.judge(judged, Path("/nonexistent/guest.sock"), {URL: osworld_path("t", URL)}, {})
        finally:
            await evaluators.close()

    runner.run(judge())


@needs_packages
@needs_evaluators
def test_an_evaluator_that_raises_is_a_fault(desktop: tuple[EmbeddedDesktop, asyncio.Runner]) -> None:
    on, runner = desktop
    with pytest.raises(EvaluatorError, match="KeyError: 'expected'"):
        runner.run(judge_officially(on, task("exact_match", PRINTED, rules(wanted="x")), {}))


def test_what_ends_without_an_answer_is_a_fault_and_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def judge() -> None:
        evaluators = OfficialEvaluators()
        monkeypatch.setattr("deskrl.actor.official.client.interpreter", lambda: Path("/bin/true"))
        with pytest.raises(OfficialFault, match="ended without an answer"):
            await evaluators.judge({}, ("127.0.0.1", 1), {}, {})
        monkeypatch.setattr("deskrl.actor.official.client.interpreter", lambda: Path(sys.executable))
        with pytest.raises(OfficialFault, match="KeyError: 'evaluator'"):
            await evaluators.judge({}, ("127.0.0.1", 1), {}, {})
        await evaluators.close()

    asyncio.run(judge())


def test_without_the_evaluators_a_task_beyond_the_built_in_ones_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DESKRL_EVALUATORS", "/nonexistent")
    environment.provided.cache_clear()
    try:
        assert unsupported(task("compare_table", FILE, rules())) == ["metric compare_table is not built in"]
    finally:
        environment.provided.cache_clear()
