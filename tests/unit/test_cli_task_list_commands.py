"""Specification of `deskrl tasks check` and `deskrl tasks subset`: output, errors and exit statuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deskrl.cli.main import main

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"{OSWORLD}: not found")

READY = {"id": "ready", "instruction": "Do it.", "related_apps": ["os"], "evaluator": {"func": "infeasible"}}
DEMANDING = {
    "id": "demanding",
    "instruction": "Do it.",
    "related_apps": ["no-such-app"],
    "proxy": True,
    "config": [
        {"type": "login", "parameters": {"platform": "google", "settings_file": "no-such.json"}},
        {"type": "download", "parameters": {"files": [{"url": "https://a.org/b", "path": "b"}]}},
    ],
    "evaluator": {"func": "no_such_metric", "result": {"type": "no_such_getter"}},
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty asset cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_list(folder: Path, tasks: Sequence[Any], *others: str) -> Path:
    """Write a list of one application `os` with these task files, and with `others`, ids without a task file."""
    examples = folder / "examples" / "os"
    examples.mkdir(parents=True)
    names = [f"t{number}" for number in range(len(tasks))]
    for name, task in zip(names, tasks, strict=True):
        (examples / f"{name}.json").write_text(task if isinstance(task, str) else json.dumps(task))
    path = folder / "list.json"
    path.write_text(json.dumps({"os": [*names, *others]}))
    return path


def check_json(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Return exit status and document of `tasks check --json`, the only content of standard output."""
    status = main(["tasks", "check", str(path), "--json", *options])
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return status, document


def test_unmet_requirements_are_reported_and_are_not_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, [READY, DEMANDING])
    assert main(["tasks", "check", str(path)]) == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "os: 2 tasks",
        "infeasible · met",
        "not installed: no-such-app",
        "network: pages behind a proxy",
        "account: google",
        "1 of 1 file not cached",
        "file not found: no-such.json",
        "unknown setup step: login",
        "unknown getter: no_such_getter",
        "2 of 2 tasks valid; requirements met for 1",
    ):
        assert part in output


def test_the_document_contains_each_task_with_its_requirements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = check_json(capsys, write_list(tmp_path, [READY, DEMANDING]))
    assert status == 0
    ready, demanding = document["valid"]
    assert (ready["met"], ready["infeasible"], demanding["met"], demanding["infeasible"]) == (True, True, False, False)
    assert demanding["requirements"]["metrics"] == ["no_such_metric"]
    assert demanding["missing_files"] == ["https://a.org/b"]
    assert document["counts"] == document["applications"]["os"]
    assert document["counts"]["valid"] == 2 and document["counts"]["accounts"] == 1


def test_all_missing_tasks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_list(tmp_path, [READY], "absent", "lost")
    assert main(["tasks", "check", str(path)]) == 1
    output = capsys.readouterr().out
    assert "not found: os/absent: " in output and "not found: os/lost: " in output
    status, document = check_json(capsys, path)
    assert (status, [task["id"] for task in document["missing"]]) == (1, ["absent", "lost"])


def test_a_malformed_task_file_is_an_error_of_one_line_after_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, [READY, "{", {"id": "b"}], "gone")
    assert main(["tasks", "check", str(path), "--json"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"deskrl: {tmp_path}/examples/os/t1.json: not valid JSON") and "(and 1 more)" in line
    document = json.loads(captured.out)
    assert [task["id"] for task in document["invalid"]] == ["t1", "t2"]
    assert document["counts"]["missing"] == 1


def test_a_malformed_url_makes_a_task_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"type": "download", "parameters": {"files": [{"url": "https://[a/b", "path": "b"}]}}]
    path = write_list(tmp_path, [DEMANDING | {"config": steps}])
    assert main(["tasks", "check", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(
        f"deskrl: {tmp_path}/examples/os/t0.json: task demanding: download: files.url: must be a string"
    )
    assert line.endswith(" (hint: correct the task file)\n")


@pytest.mark.parametrize("arguments", [["check"], ["subset", "--num", "1"]])
def test_a_malformed_list_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    path = tmp_path / "list.json"
    path.write_text('{"os": "all of them"}')
    assert main(["tasks", *arguments, str(path)]) == 2
    captured = capsys.readouterr()
    hint = 'give a task list of the form {"os": ["<id>", ...], ...}'
    assert captured.err == f"deskrl: {path}: os: must be an array of task ids (hint: {hint})\n"
    assert captured.out == ""


def test_a_subset_is_a_task_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_list(tmp_path, [READY, DEMANDING, READY])
    out = tmp_path / "two.json"
    assert main(["tasks", "subset", str(path), "--num", "2", "--seed", "5", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 tasks: os 2\n"
    assert main(["tasks", "check", str(out)]) == 0
    capsys.readouterr()
    assert main(["tasks", "subset", str(path), "--num", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_a_subset_that_cannot_be_chosen_or_written_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, [READY])
    for options in (["--num", "2"], ["--num", "0"], ["--num", "many"], ["--num", "1", "--out", str(tmp_path)], []):
        assert main(["tasks", "subset", str(path), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("deskrl: ") and " (hint: " in line


@needs_osworld
@pytest.mark.parametrize(
    ("name", "status", "num_tasks", "num_missing"),
    [
        ("test_all", 0, 369, 0),
        ("train_all_128", 0, 128, 0),
        ("test_smoke_4", 0, 4, 0),
        ("train_smoke_4", 1, 4, 3),
        ("test_10tasks_noisy", 1, 5, 5),
    ],
)
def test_lists_of_osworld_are_checked(
    capsys: pytest.CaptureFixture[str], name: str, status: int, num_tasks: int, num_missing: int
) -> None:
    found, document = check_json(capsys, OSWORLD / f"{name}.json")
    counts = document["counts"]
    assert (found, counts["tasks"], counts["missing"], counts["invalid"]) == (status, num_tasks, num_missing, 0)


@needs_osworld
def test_a_noisy_list_is_checked_with_its_root_and_suffix(capsys: pytest.CaptureFixture[str]) -> None:
    path, root = OSWORLD / "test_chrome_noisy.json", str(OSWORLD / "examples_noisy")
    status, document = check_json(capsys, path, "--root", root)
    assert (status, document["counts"]["valid"]) == (0, 18)
    assert all(task["file"].endswith("_noise.json") for task in document["valid"])
    assert check_json(capsys, path, "--root", root, "--suffix", "_loud")[0] == 1
