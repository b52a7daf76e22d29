"""Specification of the tasks that a run selects from a list, and of the errors of invalid selections."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor import materialize_tasks
from deskrl.core.config import RunConfig, WarmStartConfig, load_config
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir

INFEASIBLE = {"instruction": "Do it.", "evaluator": {"func": "infeasible"}}
DEMANDING = INFEASIBLE | {"related_apps": ["no_such_editor"], "config": [{"type": "no_such_step"}]}

Listed = Callable[..., RunConfig]


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    """Return a function that writes a task list and its task files, and returns a run configuration for it."""

    def listed(tasks: dict[str, dict[str, Any]], missing: tuple[str, ...] = (), **keys: Any) -> RunConfig:
        names: dict[str, list[str]] = {}
        for place in (*tasks, *missing):
            application, name = place.split("/")
            names.setdefault(application, []).append(name)
        for place, task in tasks.items():
            file = tmp_path / "examples" / f"{place}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"id": file.stem} | task))
        path = tmp_path / "list.json"
        path.write_text(json.dumps(names))
        config = RunConfig.model_validate({"runs": tmp_path, "tasks": {"list": path, **keys}})
        config.run_dir.mkdir(exist_ok=True)
        return config

    return listed


def test_a_run_uses_the_tasks_of_its_list_in_order(listed: Listed) -> None:
    config = listed({"os/b": INFEASIBLE, "gimp/a": INFEASIBLE})
    materialize_tasks.main(config)
    assert list(json.loads(RunDir(config.run_dir).tasks.read_text())) == ["b", "a"]
    assert not RunDir(config.run_dir).left_out.exists()


def test_all_missing_tasks_are_named(listed: Listed) -> None:
    config = listed({"os/a": INFEASIBLE}, missing=("os/gone", "vlc/away"))
    with pytest.raises(UserError, match="2 of 3 tasks do not exist: os/gone, vlc/away"):
        materialize_tasks.load(config)


def test_tasks_with_unmet_requirements_are_rejected_skipped_or_run(listed: Listed) -> None:
    tasks = {"os/plain": INFEASIBLE, "os/demanding": DEMANDING}
    with pytest.raises(UserError, match="1 of 2 tasks are not met: demanding: setup step no_such_step is not"):
        materialize_tasks.load(listed(tasks))
    config = listed(tasks, unmet_requirements="skip")
    materialize_tasks.main(config)
    assert list(json.loads(RunDir(config.run_dir).tasks.read_text())) == ["plain"]
    assert json.loads(RunDir(config.run_dir).left_out.read_text()) == {
        "demanding": ["setup step no_such_step is not built in", "application no_such_editor is not installed"]
    }
    runnable, left_out = materialize_tasks.load(listed(tasks, unmet_requirements="run"))
    assert ([task.id for task in runnable], left_out) == (["plain", "demanding"], {})


def test_a_list_without_runnable_tasks_is_rejected(listed: Listed) -> None:
    with pytest.raises(UserError, match="the requirements of 1 of 1 tasks are not met"):
        materialize_tasks.load(listed({"os/demanding": DEMANDING}, unmet_requirements="skip"))


def test_duplicate_ids_in_two_applications_are_rejected(listed: Listed) -> None:
    with pytest.raises(UserError, match="duplicate task ids: a "):
        materialize_tasks.load(listed({"os/a": INFEASIBLE, "gimp/a": INFEASIBLE}))


def test_a_warm_start_on_tasks_without_solutions_is_rejected(listed: Listed) -> None:
    config = listed({"os/a": INFEASIBLE})
    warm_started = config.learner.model_copy(update={"warm_start": WarmStartConfig()})
    with pytest.raises(UserError, match="imitates scripted solutions, but 1 of 1 tasks have none: a "):
        materialize_tasks.load(config.model_copy(update={"learner": warm_started}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("--tasks.list=a.json", '--tasks.ids=["b"]'), "set either tasks.list, or tasks.suite and tasks.ids"),
        (("--tasks.list=a.json", "--tasks.suite=b"), "set either tasks.list, or tasks.suite and tasks.ids"),
        (("--tasks.root=b",), "require tasks.list, which is not set"),
        (("--tasks.suffix=_noise",), "require tasks.list, which is not set"),
    ],
)
def test_a_list_excludes_a_suite(tmp_path: Path, keys: tuple[str, ...], message: str) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "run.toml", keys)
