"""Specification of task lists: validation, location of task files, and balanced subsets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.tasks.task_lists import balanced_subset, load_list, locate_tasks, read_list
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"{OSWORLD}: not found")

LISTED = {"gimp": ["g1", "g2", "g3", "g4"], "os": ["o1"], "vlc": ["v1", "v2", "v3"]}
TASK = {"id": "a", "instruction": "Do it.", "evaluator": {"func": "infeasible"}}

Written = Callable[[str, Any], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Return a function that writes a value as JSON, or a string unchanged, to a path below `tmp_path`."""

    def written(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return written


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ([], "not a JSON object"),
        ({}, "the list is empty"),
        ({"os": []}, "the list is empty"),
        ({"os": "a"}, "os: must be an array of task ids"),
        ({"os": [1]}, "os: must be an array of task ids"),
        ({"os": ["a", "b", "a"]}, "os: duplicate task id a"),
        ({"os": ["../a"]}, "os: '../a' cannot be the name of a file"),
        ({"..": ["a"]}, "'..' cannot be the name of a file"),
        ({"os": [""]}, "os: '' cannot be the name of a file"),
        ({"os": ["a\0"]}, "os: 'a\\x00' cannot be the name of a file"),
        ({"os": ["a" * 300]}, "cannot be the name of a file"),
    ],
)
def test_a_malformed_list_is_rejected(written: Written, value: Any, message: str) -> None:
    path = written("list.json", value)
    with pytest.raises(UserError) as caught:
        read_list(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "gone.json", "not found"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_list(path)


def test_task_files_are_in_examples_next_to_the_list_or_below_a_root(written: Written, tmp_path: Path) -> None:
    path = written("list.json", {"os": ["a"]})
    beside, elsewhere = written("examples/os/a.json", TASK), written("other/os/a.json", TASK)
    listed = read_list(path)
    assert [task.file for task in locate_tasks(path, listed)] == [beside]
    assert [task.file for task in locate_tasks(path, listed, tmp_path / "other")] == [elsewhere]
    assert [task.file for task in locate_tasks(path, listed, tmp_path)] == [beside], (
        "the parent of examples/ is accepted"
    )


def test_noisy_variants_have_the_original_ids_and_a_suffix(written: Written, tmp_path: Path) -> None:
    path, noisy = written("list.json", {"os": ["a", "b"]}), tmp_path / "noisy"
    files = [written(f"noisy/os/{name}_noise.json", TASK) for name in ("a", "b")]
    assert [task.file for task in locate_tasks(path, read_list(path), noisy, "_noise")] == files
    assert [task.file for task in locate_tasks(path, read_list(path), noisy)] == files, "the suffix is detected"
    assert [task.file.name for task in locate_tasks(path, read_list(path), noisy, "")] == ["a.json", "b.json"]
    assert len(load_list(path, noisy)) == 2


def test_a_suffix_is_detected_only_if_it_is_unambiguous(written: Written, tmp_path: Path) -> None:
    path, noisy = written("list.json", {"os": ["a", "b"]}), tmp_path / "noisy"
    for name in ("a_light", "b_heavy"):
        written(f"noisy/os/{name}.json", TASK)
    assert [task.file.name for task in locate_tasks(path, read_list(path), noisy)] == ["a.json", "b.json"]


def test_a_root_that_is_not_a_directory_is_rejected(written: Written, tmp_path: Path) -> None:
    path = written("list.json", {"os": ["a"]})
    for root in (None, tmp_path / "missing", path):
        with pytest.raises(UserError, match=r"not a directory \(hint: give the root"):
            locate_tasks(path, read_list(path), root)


def test_a_subset_is_as_balanced_as_the_list_allows() -> None:
    assert {name: len(ids) for name, ids in balanced_subset(LISTED, 7).items()} == {"gimp": 3, "os": 1, "vlc": 3}
    for num_tasks in range(1, 9):
        sizes = {name: len(ids) for name, ids in balanced_subset(LISTED, num_tasks).items()}
        assert sum(sizes.values()) == num_tasks
        largest = max(sizes.values())
        assert all(sizes.get(name, 0) >= min(len(ids), largest - 1) for name, ids in LISTED.items())


def test_a_subset_depends_on_the_seed_and_keeps_the_order_of_the_list() -> None:
    assert balanced_subset(LISTED, 5, seed=3) == balanced_subset(LISTED, 5, seed=3)
    assert len({json.dumps(balanced_subset(LISTED, 2, seed=seed)) for seed in range(20)}) > 3
    assert balanced_subset(LISTED, 8, seed=3) == LISTED
    assert list(balanced_subset(LISTED, 8)) == list(LISTED)


def test_a_subset_is_contained_in_every_larger_one_with_the_same_seed() -> None:
    def ids(num_tasks: int) -> set[str]:
        return {name for names in balanced_subset(LISTED, num_tasks, seed=1).values() for name in names}

    assert all(ids(num_tasks) < ids(num_tasks + 1) for num_tasks in range(1, 8))


@pytest.mark.parametrize("num_tasks", [-1, 0, 9])
def test_an_impossible_size_of_a_subset_is_rejected(num_tasks: int) -> None:
    with pytest.raises(UserError, match=rf"cannot choose {num_tasks} of 8 tasks \(hint: choose 1 to 8"):
        balanced_subset(LISTED, num_tasks)


@needs_osworld
@pytest.mark.parametrize(
    ("name", "num_tasks"),
    [
        ("test_10tasks", 5),
        ("test_all", 369),
        ("test_chrome", 18),
        ("test_chrome_10", 10),
        ("test_infeasible", 28),
        ("test_nogdrive", 361),
        ("test_small", 39),
        ("test_smoke_4", 4),
        ("train_all_128", 128),
        ("train_subset_32", 32),
        ("training_set_arpo", 110),
    ],
)
def test_every_list_of_osworld_is_loaded(name: str, num_tasks: int) -> None:
    assert len(load_list(OSWORLD / f"{name}.json")) == num_tasks


@needs_osworld
@pytest.mark.parametrize(("name", "num_tasks"), [("test_chrome_noisy", 18), ("test_chrome_noisy_10", 10)])
def test_noisy_lists_are_loaded_from_their_root(name: str, num_tasks: int) -> None:
    path = OSWORLD / f"{name}.json"
    noisy = load_list(path, OSWORLD / "examples_noisy", "_noise")
    plain = load_list(path)
    assert [task.id for task in noisy] == [task.id for task in plain]
    assert sum(a.data != b.data for a, b in zip(noisy, plain, strict=True)) == num_tasks
    assert load_list(path, OSWORLD / "examples_noisy") == noisy


@needs_osworld
@pytest.mark.parametrize(("name", "missing"), [("train_smoke_4", 3), ("test_10tasks_noisy", 5)])
def test_lists_of_osworld_with_unknown_tasks_are_located(name: str, missing: int) -> None:
    path = OSWORLD / f"{name}.json"
    assert sum(not task.file.is_file() for task in locate_tasks(path, read_list(path))) == missing


@needs_osworld
def test_a_balanced_subset_of_osworld_contains_every_application() -> None:
    subset = balanced_subset(read_list(OSWORLD / "test_all.json"), 32, seed=7)
    assert sorted(len(ids) for ids in subset.values()) == [3] * 8 + [4] * 2
