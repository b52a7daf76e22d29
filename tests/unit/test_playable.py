"""What a run plays of a task list: ids that must exist, tasks that it leaves out, and what it refuses in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor import prepare
from deskrl.core.config import RunConfig, WarmStartConfig, load_config
from deskrl.core.errors import UserError

INFEASIBLE = {"instruction": "Do it.", "evaluator": {"func": "infeasible"}}
NEEDY = INFEASIBLE | {"related_apps": ["no_such_editor"], "config": [{"type": "no_such_step"}]}

Listed = Callable[..., RunConfig]


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    """`listed({"os/a": task}, unplayable="skip")`: a run on a list of these tasks, and of `missing` ones."""

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
        config.folder.mkdir(exist_ok=True)
        return config

    return listed


def test_a_run_plays_the_tasks_of_its_list_in_their_order(listed: Listed) -> None:
    config = listed({"os/b": INFEASIBLE, "gimp/a": INFEASIBLE})
    prepare.main(config)
    assert list(json.loads((config.folder / "tasks.json").read_text())) == ["b", "a"]
    assert not (config.folder / "left_out.json").exists()


def test_ids_that_do_not_exist_are_named_each(listed: Listed) -> None:
    config = listed({"os/a": INFEASIBLE}, missing=("os/gone", "vlc/away"))
    with pytest.raises(UserError, match="2 of 3 tasks do not exist: os/gone, vlc/away"):
        prepare.load(config)


def test_a_task_that_needs_what_is_absent_is_refused_left_out_or_played_all_the_same(listed: Listed) -> None:
    tasks = {"os/plain": INFEASIBLE, "os/needy": NEEDY}
    with pytest.raises(UserError, match="1 of 2 tasks cannot be played here: needy: setup step no_such_step is not"):
        prepare.load(listed(tasks))
    config = listed(tasks, unplayable="skip")
    prepare.main(config)
    assert list(json.loads((config.folder / "tasks.json").read_text())) == ["plain"]
    assert json.loads((config.folder / "left_out.json").read_text()) == {
        "needy": ["setup step no_such_step is not built in", "the application no_such_editor is absent"]
    }
    playable, left_out = prepare.load(listed(tasks, unplayable="play"))
    assert ([task.id for task in playable], left_out) == (["plain", "needy"], {})


def test_a_list_of_which_nothing_is_left_is_refused(listed: Listed) -> None:
    with pytest.raises(UserError, match="1 of 1 tasks cannot be played here"):
        prepare.load(listed({"os/needy": NEEDY}, unplayable="skip"))


def test_one_id_in_two_applications_is_refused(listed: Listed) -> None:
    with pytest.raises(UserError, match="1 tasks are there twice: a;"):
        prepare.load(listed({"os/a": INFEASIBLE, "gimp/a": INFEASIBLE}))


def test_imitation_of_tasks_without_a_solution_is_refused(listed: Listed) -> None:
    config = listed({"os/a": INFEASIBLE})
    imitating = config.learner.model_copy(update={"warm_start": WarmStartConfig()})
    with pytest.raises(UserError, match="imitates scripted solutions, and 1 of 1 tasks have none: a;"):
        prepare.load(config.model_copy(update={"learner": imitating}))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (("--tasks.list=a.json", '--tasks.tasks=["b"]'), "set either tasks.list, or tasks.suite and tasks.tasks"),
        (("--tasks.list=a.json", "--tasks.suite=b"), "set either tasks.list, or tasks.suite and tasks.tasks"),
        (("--tasks.root=b",), "there is none"),
        (("--tasks.suffix=_noise",), "there is none"),
    ],
)
def test_a_list_and_a_suite_are_two_sources(tmp_path: Path, keys: tuple[str, ...], told: str) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(UserError, match=told):
        load_config(tmp_path / "run.toml", keys)
