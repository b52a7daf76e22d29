"""Specification of the tasks of MiniWoB++: lists, splits of the seeds, files of a page, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from miniwob_kit import write_wheel

from deskrl.actor.miniwob.make_tasks import main
from deskrl.actor.miniwob.page_files import page_dependencies
from deskrl.actor.miniwob.page_run import SPLITS, page_seed
from deskrl.actor.tasks.requirements import task_requirements, unsupported_reasons
from deskrl.actor.tasks.task_lists import load_list
from deskrl.core.errors import UserError


def test_each_playable_page_has_a_task_in_each_list_and_the_others_are_listed_with_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path / "out", write_wheel(tmp_path)) == 0
    tasks = {split: load_list(tmp_path / "out" / f"{split}.json") for split in SPLITS}
    assert [task.id for task in tasks["train"]] == ["broken", "echo", "two-buttons"]
    assert [task.id for task in tasks["heldout"]] == ["broken-heldout", "echo-heldout", "two-buttons-heldout"]
    assert all(not unsupported_reasons(task) for task in tasks["train"] + tasks["heldout"])
    assert "left out: moving-items: the shapes move" in capsys.readouterr().out
    assert (tmp_path / "out" / "html" / "LICENSE").read_text() == "Permission is granted."
    assert not (tmp_path / "out" / "html" / "other").exists()


def test_a_page_that_is_named_gets_a_task_although_it_is_left_out_by_default(tmp_path: Path) -> None:
    main(tmp_path / "out", write_wheel(tmp_path), ["moving-items"])
    (task,) = load_list(tmp_path / "out" / "train.json")
    assert task.id == "moving-items"


@pytest.mark.parametrize(
    ("page", "hint"), [("two-button", "similar names: two-buttons"), ("nothing-alike", "broken, echo")]
)
def test_an_unknown_page_is_an_error_that_names_similar_ones(tmp_path: Path, page: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no page {page}") as caught:
        main(tmp_path / "out", write_wheel(tmp_path), [page])
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_names_the_command_that_downloads_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not installed") as missing:
        main(tmp_path / "out")
    with pytest.raises(UserError, match="No such file") as absent:
        main(tmp_path / "out", tmp_path / "absent.whl")
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(UserError, match="not a wheel") as other:
        main(tmp_path / "out", tmp_path / "text.whl")
    for caught in (missing, absent, other):
        assert "pip download --no-deps miniwob" in str(caught.value.hint)


def test_a_task_whose_page_is_not_on_the_machine_cannot_run_there(tmp_path: Path) -> None:
    main(tmp_path / "out", write_wheel(tmp_path), ["echo"])
    (task,) = load_list(tmp_path / "out" / "train.json")
    path = tmp_path / "out" / "html" / "miniwob" / "echo.html"
    assert task_requirements(task).local_files == (str(path),)
    path.unlink()
    assert unsupported_reasons(task) == [f"{path}: not found"]


def test_a_task_with_an_unknown_split_is_invalid(tmp_path: Path) -> None:
    main(tmp_path / "out", write_wheel(tmp_path), ["echo"])
    file = tmp_path / "out" / "examples" / "miniwob" / "echo.json"
    record = json.loads(file.read_text())
    record["config"][0]["parameters"]["split"] = "test"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="split: must be one of train, heldout"):
        task_requirements(load_list(tmp_path / "out" / "train.json")[0])


def test_no_seed_is_in_both_splits_and_each_page_and_group_has_its_own() -> None:
    seeds = {split: {page_seed("click-button", split, group) for group in range(1000)} for split in SPLITS}
    assert all(len(of_split) == 1000 for of_split in seeds.values())
    assert {seed % 2 for seed in seeds["train"]} == {0}
    assert {seed % 2 for seed in seeds["heldout"]} == {1}
    assert page_seed("click-button", "train", 1) != page_seed("click-link", "train", 1)


def test_the_files_of_a_page_are_those_that_it_and_its_styles_name(tmp_path: Path) -> None:
    main(tmp_path / "out", write_wheel(tmp_path), ["echo"])
    names = page_dependencies(tmp_path / "out" / "html", "echo")
    assert names == ("core/core.css", "core/core.js", "core/images/dot.png", "miniwob/echo.html")
