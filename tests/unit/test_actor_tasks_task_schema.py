"""Specification of task files: OSWorld's files are accepted, malformed files are rejected with file and key."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from asset_cache_kit import osworld_cache_path

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.tasks.requirements import unsupported_reasons
from deskrl.actor.tasks.task_lists import load_list
from deskrl.actor.tasks.task_schema import OWN_SUITE, SMOKE_TASKS, load_tasks, parse_task, read_task
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"{OSWORLD}: not found")

TASK: dict[str, Any] = {
    "id": "press-it",
    "instruction": "Press it.",
    "related_apps": ["chromium"],
    "config": [{"type": "launch", "parameters": {"command": ["chromium"]}}],
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": ["true"]},
        "expected": {"type": "rule", "rules": {"expected": ""}},
    },
    "deskrl": {
        "solution": [
            {"thought": "Press it.", "action": {"kind": "click", "box": [10, 20, 30, 40]}},
            {"thought": "Save.", "action": {"kind": "hotkey", "keys": ["ctrl", "s"]}},
            {"thought": "Done.", "action": {"kind": "finished"}},
        ],
        "evaluate_within_s": 1,
    },
}


def changed(path: str, value: Any) -> bytes:
    """Return TASK as JSON with the item at a dotted path replaced, or removed if `value` is None."""
    task = json.loads(json.dumps(TASK))
    *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = task
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(task).encode()


def test_a_task_file_is_parsed() -> None:
    data = json.dumps(TASK).encode()
    task = parse_task(data, "press-it.json")
    assert (task.id, task.domain, task.instruction, task.evaluate_within_s) == (
        "press-it",
        "chromium",
        "Press it.",
        1.0,
    )
    assert task.config[0].type == "launch"
    assert task.evaluator.checks[0].func == "exact_match"
    assert task.data == data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", None, "t.json: id: missing"),
        ("instruction", 3, "t.json: instruction: must be a string, not 3"),
        ("config", {}, "t.json: config: must be an array, not {}"),
        ("config.0", 1, "t.json: config[0]: must be an object"),
        ("config.0.type", None, "t.json: config[0].type: missing"),
        ("evaluator", None, "t.json: evaluator: missing"),
        ("evaluator.func", None, "t.json: evaluator.func: must be the name"),
        ("evaluator.func", [], "t.json: evaluator.func: must be the name"),
        ("evaluator.func", ["a", "b"], "t.json: evaluator.result: must be an array of 2"),
        ("evaluator.result", None, "t.json: evaluator.result: missing: metric exact_match requires it"),
        ("evaluator.conj", "xor", 't.json: evaluator.conj: must be "and" or "or", not "xor"'),
        ("deskrl.evaluate_within_s", "long", 't.json: deskrl.evaluate_within_s: must be a number, not "long"'),
        ("deskrl.solution.1.thought", None, "t.json: deskrl.solution[1].thought: missing"),
        ("deskrl.solution.1.action.kind", "smash", "t.json: deskrl.solution[1].action.kind: must be one of"),
        ("deskrl.solution.1.action.kez", "s", "t.json: deskrl.solution[1].action.kez: not a field of an action"),
        ("deskrl.solution.1.action.keys", "s", 't.json: deskrl.solution[1].action.keys: must be an array, not "s"'),
        ("deskrl.solution.0.action.box", [9, 1, 2, 3], "t.json: deskrl.solution[0].action.box: must be four integers"),
        ("deskrl.solution.0.action.box", [1, 2], "t.json: deskrl.solution[0].action.box: must be four integers"),
    ],
)
def test_a_malformed_task_file_is_rejected_with_file_and_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_task(changed(path, value), "t.json")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]"])
def test_content_other_than_a_json_object_is_rejected(data: bytes) -> None:
    with pytest.raises(UserError, match=r"t\.json: not (valid JSON|a JSON object)"):
        parse_task(data, "t.json")


def test_points_of_a_solution_are_sampled_by_the_seed() -> None:
    task = parse_task(json.dumps(TASK).encode(), "t.json")
    assert task.solve(7) == task.solve(7)
    assert len({task.solve(seed)[0][1] for seed in range(20)}) > 10
    for seed in range(20):
        press, save, done = [action for _, action in task.solve(seed)]
        assert (press.kind, 10 <= press.x <= 30, 20 <= press.y <= 40) == (ActionKind.CLICK, True, True)
        assert (save, done) == (Action(ActionKind.HOTKEY, keys=("ctrl", "s")), Action(ActionKind.FINISHED))


def test_a_demonstration_uses_the_centres_of_boxes() -> None:
    (thought, press), *_ = parse_task(json.dumps(TASK).encode(), "t.json").demonstrate()
    assert (thought, press) == ("Press it.", Action(ActionKind.CLICK, x=20, y=30))


def test_the_suite_has_four_tasks_of_each_of_eight_applications() -> None:
    tasks = load_tasks()
    assert list(Counter(task.domain for task in tasks).values()) == [4] * 8
    assert len({app for task in tasks for app in task.related_apps}) == 8
    assert not [reason for task in tasks for reason in unsupported_reasons(task)]


def test_the_list_of_the_suite_contains_every_task() -> None:
    assert [task.id for task in load_list(OWN_SUITE / "all.json")] == [task.id for task in load_tasks()]


def test_the_smoke_tasks_cover_four_domains() -> None:
    assert [task.id for task in load_tasks(ids=SMOKE_TASKS)] == list(SMOKE_TASKS)
    assert len({task.domain for task in load_tasks(ids=SMOKE_TASKS)}) == 4


def test_solutions_of_the_suite_have_few_steps_and_short_thoughts() -> None:
    for task in load_tasks():
        steps = task.solve(0)
        assert 1 <= len(steps) <= 6, task.id
        assert steps[-1][1].ends_episode, task.id
        assert all(1 <= len(thought.split()) <= 6 for thought, _ in steps), task.id


def test_an_unknown_task_is_rejected_with_examples_of_existing_tasks() -> None:
    with pytest.raises(UserError, match=r"no task nonsense \(hint: choose from the \d+ tasks"):
        load_tasks(ids=["nonsense"])


def test_a_directory_without_task_files_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task files examples"):
        load_tasks(tmp_path)


def test_a_list_with_a_missing_task_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "list.json").write_text('{"os": ["missing"]}')
    with pytest.raises(UserError, match="1 of 1 tasks do not exist: os/missing "):
        load_list(tmp_path / "list.json")


def test_an_unknown_metric_is_unsupported() -> None:
    task = parse_task(changed("evaluator.func", "no_such_metric"), "t.json")
    assert unsupported_reasons(task) == ["metric no_such_metric is not built in"]


def test_a_download_without_a_local_copy_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "https://example.org/files/a.txt"
    step = {"type": "download", "parameters": {"files": [{"url": url, "path": "a.txt"}]}}
    task = parse_task(changed("config", [step]), "t.json")
    assert unsupported_reasons(task) == [f"no local copy of {url}"]
    copy = osworld_cache_path(task.id, url)
    copy.parent.mkdir(parents=True)
    copy.write_text("a")
    assert unsupported_reasons(task) == []


@needs_osworld
def test_every_task_file_of_osworld_is_valid() -> None:
    files = sorted(OSWORLD.glob("examples*/*/*.json"))
    assert len(files) > 300
    for file in files:
        read_task(file)


@needs_osworld
@pytest.mark.parametrize(("name", "num_tasks"), [("test_all", 369), ("train_all_128", 128), ("test_infeasible", 28)])
def test_lists_of_osworld_are_loaded(name: str, num_tasks: int) -> None:
    assert len(load_list(OSWORLD / f"{name}.json")) == num_tasks
