"""Task lists: read and refused, found as files in any folder and with any suffix, balanced by a seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.tasks.lists import balance, load_list, locate, read_list
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"OSWorld's task files are not at {OSWORLD}")

LISTED = {"gimp": ["g1", "g2", "g3", "g4"], "os": ["o1"], "vlc": ["v1", "v2", "v3"]}
TASK = {"id": "a", "instruction": "Do it.", "evaluator": {"func": "infeasible"}}

Written = Callable[[str, Any], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """`written("os/a.json", value)` puts JSON there below `tmp_path`, and text as it is."""

    def written(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return written


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{", "is no JSON"),
        ([], "is no map from application to task ids"),
        ({}, "names no task"),
        ({"os": []}, "names no task"),
        ({"os": "a"}, "os: is no list of task ids"),
        ({"os": [1]}, "os: is no list of task ids"),
        ({"os": ["a", "b", "a"]}, "os: names a twice"),
        ({"os": ["../a"]}, "os: '../a' is no name"),
        ({"..": ["a"]}, "'..' is no name"),
        ({"os": [""]}, "os: '' is no name"),
        ({"os": ["a\0"]}, "os: 'a\\x00' is no name"),
        ({"os": ["a" * 300]}, "is no name"),
    ],
)
def test_a_malformed_list_is_refused(written: Written, value: Any, told: str) -> None:
    path = written("list.json", value)
    with pytest.raises(UserError) as refused:
        read_list(path)
    assert str(refused.value).startswith(f"{path}: ") and told in str(refused.value)


def test_a_list_that_is_not_there_or_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_list(path)


def test_files_lie_in_examples_beside_the_list_or_below_a_root(written: Written, tmp_path: Path) -> None:
    path = written("list.json", {"os": ["a"]})
    beside, elsewhere = written("examples/os/a.json", TASK), written("other/os/a.json", TASK)
    listed = read_list(path)
    assert [task.file for task in locate(path, listed)] == [beside]
    assert [task.file for task in locate(path, listed, tmp_path / "other")] == [elsewhere]
    assert [task.file for task in locate(path, listed, tmp_path)] == [beside], "the folder above examples/ will do"


def test_noisy_variants_have_the_plain_ids_and_a_suffix(written: Written, tmp_path: Path) -> None:
    path, noisy = written("list.json", {"os": ["a", "b"]}), tmp_path / "noisy"
    files = [written(f"noisy/os/{name}_noise.json", TASK) for name in ("a", "b")]
    assert [task.file for task in locate(path, read_list(path), noisy, "_noise")] == files
    assert [task.file for task in locate(path, read_list(path), noisy)] == files, "the suffix is found out"
    assert [task.file.name for task in locate(path, read_list(path), noisy, "")] == ["a.json", "b.json"]
    assert len(load_list(path, noisy)) == 2


def test_a_suffix_is_found_out_only_where_it_is_certain(written: Written, tmp_path: Path) -> None:
    path, noisy = written("list.json", {"os": ["a", "b"]}), tmp_path / "noisy"
    for name in ("a_light", "b_heavy"):
        written(f"noisy/os/{name}.json", TASK)
    assert [task.file.name for task in locate(path, read_list(path), noisy)] == ["a.json", "b.json"]


def test_a_root_that_is_no_folder_is_refused(written: Written, tmp_path: Path) -> None:
    path = written("list.json", {"os": ["a"]})
    for root in (None, tmp_path / "gone", path):
        with pytest.raises(UserError, match="is no folder; name the root"):
            locate(path, read_list(path), root)


def test_a_subset_is_as_even_as_the_list_allows() -> None:
    assert {name: len(ids) for name, ids in balance(LISTED, 7).items()} == {"gimp": 3, "os": 1, "vlc": 3}
    for num_tasks in range(1, 9):
        sizes = {name: len(ids) for name, ids in balance(LISTED, num_tasks).items()}
        assert sum(sizes.values()) == num_tasks
        largest = max(sizes.values())
        assert all(sizes.get(name, 0) >= min(len(ids), largest - 1) for name, ids in LISTED.items())


def test_a_subset_follows_from_its_seed_and_keeps_the_lists_order() -> None:
    assert balance(LISTED, 5, seed=3) == balance(LISTED, 5, seed=3)
    assert len({json.dumps(balance(LISTED, 2, seed=seed)) for seed in range(20)}) > 3
    assert balance(LISTED, 8, seed=3) == LISTED
    assert list(balance(LISTED, 8)) == list(LISTED)


def test_a_subset_is_part_of_every_larger_one_of_its_seed() -> None:
    def ids(num_tasks: int) -> set[str]:
        return {name for names in balance(LISTED, num_tasks, seed=1).values() for name in names}

    assert all(ids(num_tasks) < ids(num_tasks + 1) for num_tasks in range(1, 8))


@pytest.mark.parametrize("num_tasks", [-1, 0, 9])
def test_a_subset_of_more_or_fewer_than_there_are_is_refused(num_tasks: int) -> None:
    with pytest.raises(UserError, match=f"cannot take {num_tasks} of 8 tasks; ask for 1 to 8"):
        balance(LISTED, num_tasks)


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
def test_every_noisy_list_is_loaded_from_its_root_and_not_as_the_plain_tasks(name: str, num_tasks: int) -> None:
    path = OSWORLD / f"{name}.json"
    noisy = load_list(path, OSWORLD / "examples_noisy", "_noise")
    plain = load_list(path)
    assert [task.id for task in noisy] == [task.id for task in plain]
    assert sum(a.data != b.data for a, b in zip(noisy, plain, strict=True)) == num_tasks
    assert load_list(path, OSWORLD / "examples_noisy") == noisy


@needs_osworld
@pytest.mark.parametrize(("name", "missing"), [("train_smoke_4", 3), ("test_10tasks_noisy", 5)])
def test_lists_of_osworld_that_name_unknown_tasks_are_located_all_the_same(name: str, missing: int) -> None:
    path = OSWORLD / f"{name}.json"
    assert sum(not task.file.is_file() for task in locate(path, read_list(path))) == missing


@needs_osworld
def test_a_balanced_subset_of_all_of_osworld_has_each_application() -> None:
    subset = balance(read_list(OSWORLD / "test_all.json"), 32, seed=7)
    assert sorted(len(ids) for ids in subset.values()) == [3] * 8 + [4] * 2
