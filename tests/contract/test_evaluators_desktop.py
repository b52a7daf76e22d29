"""Specification of built-in evaluators on a real desktop: rewards as in OSWorld, evidence, and faults."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asset_cache_kit import osworld_cache_path
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.tasks.evaluators import Evaluation, EvaluatorError, UnreadableStateError, evaluate_task
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig

FINISHED, DECLARED_INFEASIBLE = Action(ActionKind.FINISHED), Action(ActionKind.INFEASIBLE)
Json = dict[str, Any]


class Stage:
    """Desktop with the event loop on which it runs. After an evaluation, its programs are stopped."""

    def __init__(self, runner: asyncio.Runner, desktop: Desktop) -> None:
        self._runner = runner
        self._desktop = desktop

    def write(self, path: str, data: bytes) -> None:
        self._runner.run(self._desktop.write_file(path, data))

    def set_up(self, *commands: str) -> None:
        """Reset the desktop and start programs of the setup."""
        self._runner.run(self._desktop.reset())
        for command in commands:
            self._runner.run(self._desktop.launch(command, shell=True))
        self._runner.run(asyncio.sleep(0.1 * len(commands)))  # until the shells have executed the programs
        self._runner.run(self._desktop.end_setup())

    def run_as_policy(self, command: str) -> None:
        self._runner.run(self._desktop.execute(command, shell=True))

    def evaluate(self, evaluator: Json, final: Action | None = FINISHED, within_s: float = 0) -> Evaluation:
        record = {"id": "t", "instruction": "-", "evaluator": evaluator, "deskrl": {"evaluate_within_s": within_s}}
        task = parse_task(json.dumps(record).encode(), "t")
        return self._runner.run(evaluate_task(self._desktop, task, final))

    def reward(self, evaluator: Json, final: Action | None = FINISHED) -> float:
        return self.evaluate(evaluator, final).reward


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    desktop = EmbeddedDesktop(DesktopConfig(), "d", tmp_path_factory.mktemp("evaluate"))
    with asyncio.Runner() as runner:
        stage = Stage(runner, desktop)
        stage.set_up()
        yield stage
        runner.run(desktop.close())


def rule(**rules: Any) -> Json:
    return {"type": "rule", "rules": rules}


def output(command: str) -> Json:
    return {"type": "vm_command_line", "command": command, "shell": True}


def file(path: str) -> Json:
    return {"type": "vm_file", "path": path, "dest": "x"}


@pytest.mark.parametrize(
    ("func", "result", "expected", "reward"),
    [
        ("exact_match", output("echo yes"), rule(expected="yes\n"), 1.0),
        ("exact_match", output("echo no"), rule(expected="yes\n"), 0.0),
        ("exact_match", {"type": "vm_command_line", "command": ["echo", "$HOME"]}, rule(expected="$HOME\n"), 1.0),
        (
            "exact_match",
            {"type": "vm_command_error", "command": "echo e >&2", "shell": True},
            rule(expected="e\n"),
            1.0,
        ),
        ("match_in_list", output("printf b"), rule(expected=["a", "b"]), 1.0),
        ("match_in_list", output("printf c"), rule(expected=["a", "b"]), 0.0),
        ("is_in_list", output("echo some words"), rule(expected="words"), 1.0),
        ("check_include_exclude", output("echo a b"), rule(include=["a"], exclude=["c"]), 1.0),
        ("check_include_exclude", output("echo a c"), rule(include=["a"], exclude=["c"]), 0.0),
        ("check_include_exclude", output("echo b"), rule(include=["a"]), 0.0),
        ("file_contains", file("~/poem.txt"), rule(expected=["Rose", "red"]), 1.0),
        ("file_contains", file("~/poem.txt"), rule(expected=["Rose", "blue"]), 0.0),
        ("check_list", file("~/poem.txt"), rule(expect=["^A Rose", "r.d"], unexpect=["blue"]), 1.0),
        ("check_list", file("~/poem.txt"), rule(expect=["^A Rose"], unexpect=["r.d"]), 0.0),
        ("compare_text_file", file("~/poem.txt"), file("~/poem.txt"), 1.0),
        ("compare_text_file", file("~/poem.txt"), file("~/other.txt"), 0.0),
        ("compare_text_file", file("~/poem.txt"), rule(expected="A Rose\nis red\n"), 1.0),
        ("compare_text_file", file("~/missing.txt"), file("~/poem.txt"), 0.0),
        ("compare_text_file", file("~/poem.txt"), file("~/missing.txt"), 0.0),
        ("file_contains", file("~/missing.txt"), rule(expected=[]), 0.0),
        ("file_contains", file("~/Documents"), rule(expected=[]), 0.0),
        ("file_contains", file("/etc/shadow"), rule(expected=[]), 0.0),
        ("exact_match", {"type": "vm_command_line", "command": ["/etc"]}, rule(expected=""), 0.0),
    ],
)
def test_metrics_compare_the_values_of_getters(
    stage: Stage, func: str, result: Json, expected: Json, reward: float
) -> None:
    stage.write("~/poem.txt", b"A Rose\nis red\n")
    stage.write("~/other.txt", b"a rose  is red")
    assert stage.reward({"func": func, "result": result, "expected": expected}) == reward


def test_options_control_the_comparison_of_text_files(stage: Stage) -> None:
    stage.write("~/poem.txt", b"A Rose\nis red\n")
    stage.write("~/other.txt", b"a rose  is red")
    evaluator = {"func": "compare_text_file", "result": file("~/poem.txt"), "expected": file("~/other.txt")}
    assert stage.reward({**evaluator, "options": {"ignore_blanks": True}}) == 0.0
    assert stage.reward({**evaluator, "options": {"ignore_blanks": True, "ignore_case": True}}) == 1.0


def test_a_file_is_compared_with_the_local_copy_of_a_cloud_file(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "https://example.org/gold.txt"
    evaluator = {
        "func": "compare_text_file",
        "result": file("~/poem.txt"),
        "expected": {"type": "cloud_file", "path": url, "dest": "gold.txt"},
    }
    osworld_cache_path("t", url).parent.mkdir(parents=True)
    osworld_cache_path("t", url).write_bytes(b"gold")
    stage.write("~/poem.txt", b"gold")
    assert stage.reward(evaluator) == 1.0


@pytest.mark.parametrize(
    ("func", "rules", "reward"),
    [
        ("check_image_size", {"width": 30, "height": 20}, 1.0),
        ("check_image_size", {"height": 30}, 0.0),
        ("check_image_pixels", {"size": [30, 20], "pixels": [{"at": [3, 4], "rgb": [250, 0, 0]}]}, 1.0),
        ("check_image_pixels", {"pixels": [{"at": [3, 4], "rgb": [246, 4, 0]}], "tolerance": 4}, 1.0),
        ("check_image_pixels", {"pixels": [{"at": [3, 4], "rgb": [246, 5, 0]}], "tolerance": 4}, 0.0),
        ("check_image_pixels", {"pixels": [{"at": [30, 4], "rgb": [250, 0, 0]}]}, 0.0),
        ("check_image_pixels", {"size": [20, 30], "pixels": []}, 0.0),
    ],
)
def test_images_are_compared_by_size_and_pixels(stage: Stage, func: str, rules: Json, reward: float) -> None:
    picture = io.BytesIO()
    Image.new("RGBA", (30, 20), (250, 0, 0, 255)).save(picture, "PNG")
    evaluator = {"func": func, "result": file("~/picture.png"), "expected": rule(**rules)}
    stage.write("~/picture.png", picture.getvalue())
    assert stage.reward(evaluator) == reward
    for not_a_picture in (b"", b"no picture", picture.getvalue()[:40]):
        stage.write("~/picture.png", not_a_picture)
        assert stage.reward(evaluator) == 0.0


def both(conj: str, *commands: str) -> Json:
    return {
        "func": ["exact_match"] * len(commands),
        "conj": conj,
        "result": [output(command) for command in commands],
        "expected": [rule(expected="1")] * len(commands),
    }


@pytest.mark.parametrize(
    ("conj", "commands", "reward"),
    [
        ("and", ["printf 1", "printf 1"], 1.0),
        ("and", ["printf 1", "printf 0"], 0.0),
        ("or", ["printf 0", "printf 1"], 1.0),
        ("or", ["printf 0", "printf 0"], 0.0),
    ],
)
def test_several_metrics_are_combined(stage: Stage, conj: str, commands: list[str], reward: float) -> None:
    assert stage.reward(both(conj, *commands)) == reward


def test_declaring_a_task_infeasible_is_correct_only_for_infeasible_tasks(stage: Stage) -> None:
    true = {"func": "exact_match", "result": output("printf 1"), "expected": rule(expected="1")}
    assert [stage.reward(true, final) for final in (FINISHED, None, DECLARED_INFEASIBLE)] == [1.0, 1.0, 0.0]
    assert [stage.reward({"func": "infeasible"}, final) for final in (FINISHED, None, DECLARED_INFEASIBLE)] == [
        0.0,
        0.0,
        1.0,
    ]


def test_postconfig_runs_before_the_getters(stage: Stage) -> None:
    step = {"type": "execute", "parameters": {"command": ["touch", "~/after"]}}
    evaluator = {"func": "exact_match", "result": output("ls after"), "expected": rule(expected="after\n")}
    assert stage.reward({**evaluator, "postconfig": [step]}) == 1.0


def test_a_negative_evaluation_is_repeated_until_the_timeout_of_the_task(stage: Stage) -> None:
    stage.set_up("sleep 0.3; echo late > late.txt")
    evaluator = {"func": "file_contains", "result": file("~/late.txt"), "expected": rule(expected=["late"])}
    evaluation = stage.evaluate(evaluator, within_s=20)
    assert (evaluation.reward, evaluation.evidence["asked"] > 1) == (1.0, True)


@pytest.mark.parametrize("session", [True, False])
def test_programs_of_the_policy_do_not_run_during_an_evaluation(stage: Stage, session: bool) -> None:
    stage.set_up("exec sleep 1001")
    stage.run_as_policy("setsid sleep 1002 &")
    evaluator = {
        "func": "exact_match",
        "result": {**output("pgrep -a sleep"), "session": session},
        "expected": rule(expected=""),
    }
    [check] = stage.evaluate(evaluator).evidence["checks"]
    assert ("sleep 1001" in check["result"], "sleep 1002" in check["result"]) == (session, False)


@pytest.mark.parametrize(
    ("command", "done_by_policy", "reward"),
    [
        (["/bin/sh", "-c", "test -e missing && exit 127"], "touch missing", 0.0),
        (["/bin/sh", "-c", "echo yes; exit 127"], "true", 1.0),
        (["~/judge"], "true", 1.0),
        (["~/judge"], "rm ~/judge", 0.0),
        (["~/judge"], "echo '#!/no/such/interpreter' > ~/judge", 0.0),
        (["/bin/sh", "-c", "echo yes; no-such-program"], "printf '#!/bin/sh' > ~/no-such-program", 1.0),
    ],
)
def test_a_policy_cannot_make_an_evaluator_seem_defective(
    stage: Stage, command: list[str], done_by_policy: str, reward: float
) -> None:
    """A defective evaluator is a fault, so that the episode would be repeated."""
    stage.set_up()
    stage.run_as_policy("printf '#!/bin/sh\necho yes' > ~/judge; chmod +x ~/judge")
    stage.run_as_policy(done_by_policy)
    result = {"type": "vm_command_line", "command": command}
    assert stage.reward({"func": "exact_match", "result": result, "expected": rule(expected="yes\n")}) == reward


def test_a_missing_program_of_a_guest_that_the_host_cannot_observe_makes_the_state_unreadable(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedDesktop, "can_observe_host", False)
    result = {"type": "vm_command_line", "command": ["no-such-program"]}
    with pytest.raises(UnreadableStateError, match="has no program"):
        stage.evaluate({"func": "exact_match", "result": result, "expected": rule(expected="")})


def test_a_command_that_does_not_finish_makes_the_state_unreadable(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deskrl.actor.tasks.evaluators._COMMAND_TIMEOUT_S", 0.5)
    stage.run_as_policy("mkfifo pipe")
    with pytest.raises(UnreadableStateError, match="did not finish"):
        stage.evaluate({"func": "exact_match", "result": output("cat pipe"), "expected": rule(expected="")})


@pytest.mark.parametrize(("text", "reward"), [("page 4 of 6", 1.0), ("page 4 of 6!", 0.0)])
def test_a_pattern_must_match_the_whole_text(stage: Stage, text: str, reward: float) -> None:
    pattern = rule(pattern=r"page \d of 6")
    assert stage.reward({"func": "match_pattern", "result": output(f"printf '{text}'"), "expected": pattern}) == reward


def test_the_evidence_contains_the_compared_values(stage: Stage) -> None:
    evaluator = {"func": "exact_match", "result": output("printf %01000d 7"), "expected": rule(expected="yes")}
    evaluation = stage.evaluate(evaluator)
    [check] = json.loads(evaluation.evidence_json)["checks"]
    assert (check["func"], check["score"], check["expected"]) == ("exact_match", 0.0, {"expected": "yes"})
    assert check["result"].startswith("0000")
    assert len(check["result"]) < 500


@pytest.mark.parametrize(
    "evaluator",
    [
        {"func": "compare_table", "result": output("true")},
        {"func": "exact_match", "result": {"type": "vlc_config"}},
        {"func": "exact_match", "result": output("true"), "expected": rule()},
        {"func": "exact_match", "result": output("true")},
        {"func": "exact_match", "result": {"type": "vm_command_line"}, "expected": rule(expected="")},
        {
            "func": "exact_match",
            "result": {"type": "vm_command_line", "command": ["no-such-program"]},
            "expected": rule(expected=""),
        },
        {"func": "check_list", "result": file("~/poem.txt"), "expected": rule(expect=["("])},
    ],
)
def test_an_evaluator_that_fails_raises_an_error(stage: Stage, evaluator: Json) -> None:
    stage.write("~/poem.txt", b"A Rose\n")
    with pytest.raises(EvaluatorError):
        stage.evaluate(evaluator)
