"""Noisy variants: the same bytes again, the task itself untouched, and more with each level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.tasks.files import OWN_SUITE, Task, load_tasks, parse_task, read_task
from deskrl.actor.tasks.needs import absent_programs, task_needs
from deskrl.actor.tasks.noise import LEVELS, Level, make_noisy
from deskrl.core.cli import main

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"

TABS = {
    "id": "tabs",
    "instruction": "Close the tab.",
    "related_apps": ["chrome"],
    "config": [{"type": "chrome_open_tabs", "parameters": {"urls_to_open": ["file:///a.html"]}}],
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "active_tab_info"},
        "expected": {"type": "rule", "rules": {"expected": "a"}},
    },
}


def task(**changes: Any) -> Task:
    return parse_task(json.dumps(TABS | changes).encode(), "t.json")


def variant(of: Task, level: Level, seed: int = 0) -> dict[str, Any]:
    return dict(json.loads(make_noisy(of, level, seed)))


def steps(of: Task, level: Level) -> list[str]:
    return [json.dumps(step) for step in variant(of, level)["config"]]


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_task_level_and_seed_give_the_same_bytes_and_another_seed_gives_others(level: Level) -> None:
    for own in load_tasks():
        assert make_noisy(own, level, 3) == make_noisy(own, level, 3)
        assert len({make_noisy(own, level, seed) for seed in range(8)}) > 4


@pytest.mark.parametrize("level", LEVELS)
def test_a_variant_has_the_tasks_id_instruction_evaluator_and_setup(level: Level) -> None:
    for own in load_tasks():
        plain, noisy = json.loads(own.data), variant(own, level)
        assert all(noisy[key] == plain[key] for key in ("id", "instruction", "evaluator", "related_apps"))
        kept = [step for step in noisy["config"] if step in plain["config"]]
        assert kept == plain["config"] and len(noisy["config"]) > len(kept)


def test_a_level_has_all_that_the_one_before_adds() -> None:
    for own in load_tasks():
        light, medium, heavy = (steps(own, level) for level in LEVELS)
        assert set(light) < set(medium) < set(heavy), own.id
        added = [variant(own, level)["noise_meta"]["adds"] for level in LEVELS]
        assert len(added[0]) < len(added[1]) < len(added[2])


def test_a_heavy_variants_solution_begins_by_closing_the_message() -> None:
    for own in load_tasks():
        assert len(read(make_noisy(own, "medium")).solution) == len(own.solution)
        close, *rest = read(make_noisy(own, "heavy")).solution
        assert close.action.keys == ("alt", "f4") and tuple(rest) == own.solution


def read(data: bytes) -> Task:
    return parse_task(data, "variant")


def test_what_lies_on_top_comes_after_a_window_that_the_task_does_not_wait_for() -> None:
    launch = {"type": "launch", "parameters": {"command": ["google-chrome"]}}
    sleeps = {"type": "sleep", "parameters": {"seconds": 5}}
    assert sleeps in variant(task(config=[launch]), "medium")["config"]
    assert sleeps not in variant(task(config=[launch, *TABS["config"]]), "medium")["config"]  # type: ignore[misc]


def test_noise_stays_out_of_folders_and_applications_that_the_task_is_about() -> None:
    for seed in range(10):
        added = json.dumps(variant(task(instruction="Look into Downloads and Music."), "medium", seed)["config"])
        assert "Downloads" not in added and "/Music" not in added
    busy = task(related_apps=["gedit", "nautilus"])
    assert not any(step["type"] == "open" for step in variant(busy, "medium")["config"])
    assert variant(busy, "light")["noise_meta"]["leaves_out"] != []


def test_a_note_covers_nothing_that_the_solution_aims_at() -> None:
    clicks = [{"thought": "-", "action": {"kind": "click", "x": x, "y": y}} for x, y in [(1200, 60), (1200, 690)]]
    for seed in range(10):
        added = variant(task(deskrl={"solution": clicks}), "medium", seed)["noise_meta"]["adds"]
        assert any("corner bottom-left" in what for what in added)
    everywhere = [*clicks, {"thought": "-", "action": {"kind": "click", "x": 60, "y": 690}}]
    meta = variant(task(deskrl={"solution": everywhere}), "medium")["noise_meta"]
    assert meta["leaves_out"] == ["a note: the solution needs every corner of the screen"]


def test_a_further_tab_is_opened_before_the_tasks_own_unless_the_evaluator_counts_them() -> None:
    (opens,) = [step for step in variant(task(), "medium")["config"] if step["type"] == "chrome_open_tabs"]
    first, last = opens["parameters"]["urls_to_open"]
    assert first.startswith("file:///home/user/") and last == "file:///a.html"
    counted = task(evaluator=TABS["evaluator"] | {"result": {"type": "open_tabs_info"}})  # type: ignore[operator]
    assert TABS["config"][0] in variant(counted, "medium")["config"]  # type: ignore[index]
    assert variant(counted, "medium")["noise_meta"]["leaves_out"] == ["a tab: the evaluator looks at the tabs"]


@pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"OSWorld's task files are not at {OSWORLD}")
def test_every_task_of_osworld_has_variants_that_need_no_further_program() -> None:
    for file in sorted(OSWORLD.glob("examples/*/*.json")):
        plain = read_task(file)
        noisy = read(make_noisy(plain, "heavy"))
        assert set(task_needs(noisy).programs) <= {*task_needs(plain).programs, "bash", "python"}, file
        assert task_needs(noisy).network == task_needs(plain).network, file
    assert not {"bash", "python"} & set(absent_programs(task_needs(noisy)))


def test_the_command_writes_a_list_with_its_variants_where_noisy_looks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = OWN_SUITE / "all.json"
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert main(["tasks", "noisy", str(own), "--level", "heavy", "--seed", "7", "--out", str(folder)]) == 0
        assert "32 tasks with heavy noise" in capsys.readouterr().out
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert written[0] == written[1] and len(written[0]) == 33
    assert Path("examples_noisy/os/make-a-folder_noise.json") in written[0]
    root = tmp_path / "a" / "examples_noisy"
    assert main(["tasks", "check", str(tmp_path / "a" / "all.json"), "--root", str(root)]) == 0
    assert "32 of 32 tasks valid" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "folder"
    assert main(["tasks", "noisy", str(OWN_SUITE / "all.json"), "--level", "light", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"deskrl: {out}: cannot be written: ")
