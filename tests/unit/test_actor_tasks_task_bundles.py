"""Specification of task bundles: their translation to task files, the reward of check.sh, and errors in bundles."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deskrl.actor import materialize_tasks
from deskrl.actor.extensions import check_extensions
from deskrl.actor.tasks.audit import claims_of
from deskrl.actor.tasks.check_script import NoRewardError, RewardSource, ScriptResult, script_reward
from deskrl.actor.tasks.list_report import check_list
from deskrl.actor.tasks.requirements import task_requirements
from deskrl.actor.tasks.task_bundles import MAX_FILES_BYTES, MAX_SCRIPT_BYTES
from deskrl.actor.tasks.task_lists import load_list
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.cli.main import main
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

INSTRUCTION = 'instruction = "Sort the list."\n'
REWARD = "async def reward(episode):\n    return 0.5\n"

MakeBundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path) -> MakeBundle:
    """Return a function that writes a bundle `sort` with a check, and returns its folder; None leaves a file out."""

    def make(files: dict[str, str | bytes | None] | None = None, folder: str = "bundles/sort") -> Path:
        for name, content in ({"task.toml": INSTRUCTION, "check.sh": "test -f done\n"} | (files or {})).items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / folder

    return make


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tasks(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Translation.


def test_a_bundle_uploads_its_files_runs_its_setup_and_launches_its_applications_in_this_order(
    bundle: MakeBundle,
) -> None:
    settings = INSTRUCTION + 'applications = ["mousepad"]\nlaunch = [["mousepad", "a.txt"], "xcalc &"]\n'
    files = {"files/a.txt": "b\na\n", "files/sub/i.png": b"\x89PNG\xff", "setup.sh": "mkdir ~/out\n"}
    (task,) = load_tasks(bundle({"task.toml": settings, **files}))
    assert [step.type for step in task.config] == ["upload_file", "setup_script", "launch", "launch"]
    upload, setup, *launched = (step.parameters for step in task.config)
    assert upload["files"] == [
        {"path": "~/a.txt", "content": "b\na\n"},
        {"path": "~/sub/i.png", "base64": base64.b64encode(b"\x89PNG\xff").decode()},
    ]
    assert setup == {"command": ["/bin/bash", "-c", "mkdir ~/out\n"], "timeout_s": 30.0}
    assert [(item["command"], item["shell"]) for item in launched] == [
        (["mousepad", "a.txt"], False),
        ("xcalc &", True),
    ]
    assert (task.id, task.domain, task.instruction) == ("sort", "mousepad", "Sort the list.")


def test_check_and_solution_are_those_of_the_settings(bundle: MakeBundle) -> None:
    settings = INSTRUCTION + '[check]\nreward = "number"\nsession = true\ntimeout_s = 5\nwithin_s = 2\n'
    settings += '[[solution]]\nthought = "Done."\naction = { kind = "finished" }\n'
    (task,) = load_tasks(bundle({"task.toml": settings}))
    (check,) = task.evaluator.checks
    assert check.result is not None
    expected = {"command": ["/bin/bash", "-c", "test -f done\n"], "session": True, "timeout_s": 5.0}
    assert (check.func, check.result.parameters, check.options) == ("script_reward", expected, {"reward": "number"})
    assert (task.evaluate_within_s, [step.thought for step in task.solution]) == (2.0, ["Done."])


def test_the_translation_depends_only_on_the_files_of_the_bundle(bundle: MakeBundle) -> None:
    folder = bundle({"files/b": "1", "files/a": "2"})
    assert load_tasks(folder)[0].data == load_tasks(folder)[0].data
    assert folder.parts[-2].encode() not in load_tasks(folder)[0].data, "rollouts carry no paths of this machine"


def test_programs_and_files_of_the_scripts_are_known_to_the_checks_of_tasks(bundle: MakeBundle) -> None:
    (task,) = load_tasks(bundle({"check.sh": "# a comment\njq .x ~/out.json\n", "setup.sh": "curl http://x.org/a\n"}))
    required = task_requirements(task)
    assert "jq" in required.programs and required.network == ("a command fetches packages or files",)
    assert claims_of(task).paths == ("~/out.json",)


def test_a_folder_of_bundles_a_suite_with_both_and_a_list_with_bundles_can_be_loaded(
    bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle(folder="many/b")
    bundle(folder="many/group/a")
    assert [task.id for task in load_tasks(tmp_path / "many")] == ["b", "a"]
    bundle(folder="suite/examples/os/mine")
    plain = {"id": "plain", "instruction": "Do it.", "evaluator": {"func": "infeasible"}}
    (tmp_path / "suite/examples/os/plain.json").write_text(json.dumps(plain))
    assert [task.id for task in load_tasks(tmp_path / "suite")] == ["mine", "plain"]
    assert [task.id for task in load_tasks(tmp_path / "suite", ["mine"])] == ["mine"]
    (tmp_path / "suite/list.json").write_text('{"os": ["plain", "mine"]}')
    assert [task.id for task in load_list(tmp_path / "suite/list.json")] == ["plain", "mine"]


def test_a_run_trains_on_the_bundles_of_its_suite(bundle: MakeBundle, tmp_path: Path) -> None:
    tasks = {"suite": bundle().parent}
    runnable, left_out = materialize_tasks.load(RunConfig.model_validate({"runs": tmp_path, "tasks": tasks}))
    assert ([task.id for task in runnable], left_out) == (["sort"], {})


def test_the_report_on_a_folder_counts_valid_and_invalid_bundles(bundle: MakeBundle, tmp_path: Path) -> None:
    bundle()
    bundle({"check.sh": None}, folder="bundles/broken")
    report = check_list(tmp_path / "bundles")
    assert ([task.listed.id for task in report.valid], [task.listed.id for task in report.invalid]) == (
        ["sort"],
        ["broken"],
    )


# Reward of check.sh.


@pytest.mark.parametrize(
    ("status", "stdout", "source", "reward"),
    [
        (0, "", "exit_status", 1.0),
        (0, "0.25\n", "exit_status", 1.0),
        (1, "1.0\n", "exit_status", 0.0),
        (125, "", "exit_status", 0.0),
        (0, "looking\n0.25\n", "number", 0.25),
        (0, "1\n\n  \n", "number", 1.0),
        (0, " .5 ", "number", 0.5),
        (0, "-0", "number", 0.0),
        (0, "1e-1", "number", 0.1),
        (1, "", "number", 0.0),
        (2, "0.75\n", "number", 0.0),
    ],
)
def test_the_reward_is_the_exit_status_or_the_last_line(
    status: int, stdout: str, source: RewardSource, reward: float
) -> None:
    assert script_reward(ScriptResult(status, stdout, ""), source) == reward


@pytest.mark.parametrize("source", ["exit_status", "number"])
@pytest.mark.parametrize("status", [126, 127, 137, 255, -9])
def test_a_script_that_cannot_run_or_is_killed_gives_no_reward(status: int, source: RewardSource) -> None:
    with pytest.raises(NoRewardError, match=f"exit status {status} jq: command not found"):
        script_reward(ScriptResult(status, "1.0", "trace\njq: command not found\n"), source)


@pytest.mark.parametrize(
    "line", ["", "\n", "nan", "inf", "2", "-0.1", "1.5e0", "1e999", "solved", "0,5", "0.5 of 1", "1_0"]
)
def test_a_last_line_that_is_no_number_from_0_to_1_is_no_reward(line: str) -> None:
    with pytest.raises(NoRewardError, match=r"number in \[0, 1\]"):
        script_reward(ScriptResult(0, f"1.0\n{line}" if line.strip() else line, ""), "number")


# Errors.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"check.sh": None}, "sort: has neither check.sh nor reward.py (hint: add the check"),
        ({"reward.py": REWARD}, "sort: has both check.sh and reward.py (hint: remove one of them"),
        ({"task.toml": 'instruction = "  "\n'}, "task.toml: instruction: is empty (hint: say what"),
        ({"task.toml": ""}, "task.toml: instruction: Field required"),
        ({"task.toml": "instruction = 3\n"}, "task.toml: instruction: Input should be a valid string"),
        ({"task.toml": "instruction"}, "task.toml: not valid TOML"),
        ({"task.toml": INSTRUCTION + "seed = 1\n"}, "task.toml: seed: unknown key (hint: its keys are instruction"),
        (
            {"task.toml": INSTRUCTION + "[check]\ntimeout_s = 0\n"},
            "task.toml: check.timeout_s: Input should be greater",
        ),
        ({"task.toml": INSTRUCTION + '[check]\nreward = "text"\n'}, "check.reward: Input should be 'exit_status' or"),
        ({"task.toml": INSTRUCTION + "launch = [[]]\n"}, "launch.0"),
        ({"task.toml": INSTRUCTION + "[[solution]]\nthought = 1\n"}, "task.toml: deskrl.solution[0].action: missing"),
        ({"task.toml": b"\xff"}, "task.toml: not UTF-8"),
        ({"check.sh": " \n"}, "check.sh: is empty"),
        ({"check.sh": "if true\n"}, "check.sh: bash cannot parse it: -c: line"),
        ({"setup.sh": b"echo \xff\n"}, "setup.sh: not UTF-8: invalid start byte at byte 5"),
        ({"setup.sh": "#" * (MAX_SCRIPT_BYTES + 1)}, "setup.sh: 102401 bytes exceed the limit of 102400"),
        ({"files/a": b"x" * MAX_FILES_BYTES, "files/b": "x"}, "the largest is "),
        ({"files": "x"}, "files: is not a folder"),
        (
            {"check.sh": None, "reward.py": REWARD, "task.toml": INSTRUCTION + "[check]\n"},
            "check: the bundle has no check",
        ),
    ],
)
def test_an_invalid_bundle_is_reported(bundle: MakeBundle, files: dict[str, str | bytes | None], expected: str) -> None:
    assert expected in error_of(bundle(files))


@pytest.mark.parametrize("place", ["check.sh", "setup.sh", "files/a", "files", "task.toml"])
def test_a_link_that_leaves_the_bundle_is_reported(bundle: MakeBundle, tmp_path: Path, place: str) -> None:
    folder = bundle()
    outside = tmp_path / "outside"
    outside.mkdir() if place == "files" else outside.write_text(INSTRUCTION)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(outside)
    assert f"{place}: is a link that leaves the bundle: {outside}" in error_of(folder)


def test_a_link_within_the_bundle_is_followed_and_a_pipe_is_reported(bundle: MakeBundle) -> None:
    folder = bundle({"files/a": "text"})
    (folder / "files/b").symlink_to("a")
    uploaded = load_tasks(folder)[0].config[0].parameters["files"]
    assert [file["content"] for file in uploaded] == ["text", "text"]
    os.mkfifo(folder / "files/c")
    assert "files/c: is not a regular file" in error_of(folder)


def test_two_tasks_with_the_same_id_are_reported(bundle: MakeBundle, tmp_path: Path) -> None:
    bundle(folder="bundles/one/sort")
    bundle(folder="bundles/two/sort")
    assert "two tasks have the id sort: " in error_of(tmp_path / "bundles")


@pytest.mark.parametrize("command", [("prove", "--suite"), ("audit", "--suite"), ("check",)])
def test_commands_reject_an_invalid_bundle_in_one_line(
    bundle: MakeBundle, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle({"check.sh": None})
    assert main(["tasks", *command, str(folder)]) == 2
    assert "has neither check.sh nor reward.py" in capsys.readouterr().err.splitlines()[-1]


# Rewards in Python.


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import no_such_module\n", "raised while it was imported: ModuleNotFoundError"),
        ("def score(episode): ...\n", "reward.py: defines no `reward` (hint: define a function"),
        ("reward = 1.0\n", "cannot be used as reward: it cannot be called"),
        ("def reward(): ...\n", "it does not take the arguments episode"),
        ("class reward: ...\n", "it has no method score"),
    ],
)
def test_an_invalid_reward_is_reported_before_a_run(bundle: MakeBundle, code: str, expected: str) -> None:
    folder = bundle({"check.sh": None, "reward.py": code})
    with pytest.raises(UserError) as caught:
        check_extensions(RunConfig.model_validate({"tasks": {"suite": folder}}))
    assert expected in str(caught.value) and str(folder / "reward.py") in str(caught.value)
