"""Specification of noisy variants: reproducible, with the original task unchanged, and more noise at each level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor import materialize_tasks
from deskrl.actor.task import Task
from deskrl.actor.tasks.noise import NOISE_LEVELS, NoiseLevel, add_rollout_noise, make_noisy, with_noise
from deskrl.actor.tasks.requirements import missing_programs, task_requirements
from deskrl.actor.tasks.task_schema import OWN_SUITE, load_tasks, parse_task, read_task
from deskrl.cli.main import main
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.learner.curriculum import Curriculum
from deskrl.proto.v1 import rollout_pb2

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


def variant(of: Task, level: NoiseLevel, seed: int = 0) -> dict[str, Any]:
    return dict(json.loads(make_noisy(of, level, seed)))


def steps(of: Task, level: NoiseLevel) -> list[str]:
    return [json.dumps(step) for step in variant(of, level)["config"]]


@pytest.mark.parametrize("level", NOISE_LEVELS)
def test_variants_are_reproducible_and_depend_on_the_seed(level: NoiseLevel) -> None:
    for own in load_tasks():
        assert make_noisy(own, level, 3) == make_noisy(own, level, 3)
        assert len({make_noisy(own, level, seed) for seed in range(8)}) > 4


@pytest.mark.parametrize("level", NOISE_LEVELS)
def test_a_variant_keeps_the_id_instruction_evaluator_and_setup_of_the_task(level: NoiseLevel) -> None:
    for own in load_tasks():
        plain, noisy = json.loads(own.data), variant(own, level)
        assert all(noisy[key] == plain[key] for key in ("id", "instruction", "evaluator", "related_apps"))
        kept = [step for step in noisy["config"] if step in plain["config"]]
        assert kept == plain["config"] and len(noisy["config"]) > len(kept)


def test_each_level_includes_the_noise_of_the_previous_level() -> None:
    for own in load_tasks():
        light, medium, heavy = (steps(own, level) for level in NOISE_LEVELS)
        assert set(light) < set(medium) < set(heavy), own.id
        added = [variant(own, level)["noise_meta"]["adds"] for level in NOISE_LEVELS]
        assert len(added[0]) < len(added[1]) < len(added[2])


def test_the_solution_of_a_heavy_variant_starts_by_closing_the_message() -> None:
    for own in load_tasks():
        assert len(read(make_noisy(own, "medium")).solution) == len(own.solution)
        close, *rest = read(make_noisy(own, "heavy")).solution
        assert close.action.keys == ("alt", "f4") and tuple(rest) == own.solution


def read(data: bytes) -> Task:
    return parse_task(data, "variant")


def test_noise_on_top_waits_for_a_window_for_which_the_task_does_not_wait() -> None:
    launch = {"type": "launch", "parameters": {"command": ["google-chrome"]}}
    sleeps = {"type": "sleep", "parameters": {"seconds": 5}}
    assert sleeps in variant(task(config=[launch]), "medium")["config"]
    assert sleeps not in variant(task(config=[launch, *TABS["config"]]), "medium")["config"]  # type: ignore[misc]


def test_noise_avoids_directories_and_applications_of_the_task() -> None:
    for seed in range(10):
        added = json.dumps(variant(task(instruction="Look into Downloads and Music."), "medium", seed)["config"])
        assert "Downloads" not in added and "/Music" not in added
    busy = task(related_apps=["gedit", "nautilus"])
    assert not any(step["type"] == "open" for step in variant(busy, "medium")["config"])
    assert variant(busy, "light")["noise_meta"]["leaves_out"] != []


def test_a_note_does_not_cover_targets_of_the_solution() -> None:
    clicks = [{"thought": "-", "action": {"kind": "click", "x": x, "y": y}} for x, y in [(1200, 60), (1200, 690)]]
    for seed in range(10):
        added = variant(task(deskrl={"solution": clicks}), "medium", seed)["noise_meta"]["adds"]
        assert any("corner bottom-left" in what for what in added)
    everywhere = [*clicks, {"thought": "-", "action": {"kind": "click", "x": 60, "y": 690}}]
    meta = variant(task(deskrl={"solution": everywhere}), "medium")["noise_meta"]
    assert meta["leaves_out"] == ["a note: the solution needs every corner of the screen"]


def test_an_additional_tab_is_opened_first_unless_the_evaluator_examines_tabs() -> None:
    (opens,) = [step for step in variant(task(), "medium")["config"] if step["type"] == "chrome_open_tabs"]
    first, last = opens["parameters"]["urls_to_open"]
    assert first.startswith("file:///home/user/") and last == "file:///a.html"
    counted = task(evaluator=TABS["evaluator"] | {"result": {"type": "open_tabs_info"}})  # type: ignore[operator]
    assert TABS["config"][0] in variant(counted, "medium")["config"]  # type: ignore[index]
    assert variant(counted, "medium")["noise_meta"]["leaves_out"] == ["a tab: the evaluator looks at the tabs"]


@pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"{OSWORLD}: not found")
def test_variants_of_osworld_tasks_require_no_additional_program_or_network() -> None:
    for file in sorted(OSWORLD.glob("examples/*/*.json")):
        plain = read_task(file)
        noisy = read(make_noisy(plain, "heavy"))
        assert set(task_requirements(noisy).programs) <= {*task_requirements(plain).programs, "bash", "python"}, file
        assert task_requirements(noisy).network == task_requirements(plain).network, file
    assert not {"bash", "python"} & set(missing_programs(task_requirements(noisy)))


def test_the_command_writes_the_list_and_its_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_output_directory_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "folder"
    assert main(["tasks", "noisy", str(OWN_SUITE / "all.json"), "--level", "light", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"deskrl: {out}: cannot be written: ")


# Noise of rollouts.


def rollout(member: int, group: str = "train/000003", seed: int = 7) -> rollout_pb2.Rollout:
    return rollout_pb2.Rollout(
        group_id=group, queue=group.rpartition("/")[0], episode_id=f"{group}.{member}", seed=seed + member
    )


def config_with(seed: int = 0, **tasks: str) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "tasks": tasks})


@pytest.mark.parametrize("level", NOISE_LEVELS)
def test_all_rollouts_of_a_training_group_have_the_same_noise_and_groups_have_different_noise(
    level: NoiseLevel,
) -> None:
    (own,) = load_tasks(ids=["write-a-word"])
    config = config_with(noise=level)
    played = {add_rollout_noise(own, rollout(member), config).data for member in range(8)}
    assert len(played) == 1 and json.loads(played.pop())["noise_meta"]["noise_level"] == level
    groups = {add_rollout_noise(own, rollout(0, f"train/{number:06d}"), config).data for number in range(8)}
    assert len(groups) > 4
    again, other = (config_with(seed, noise=level) for seed in (0, 1))
    assert add_rollout_noise(own, rollout(0), config) == add_rollout_noise(own, rollout(0), again)
    others = {add_rollout_noise(own, rollout(0, f"train/{number:06d}"), other).data for number in range(8)}
    assert others != groups, "another seed of the run gives other noise"


def test_the_rollouts_that_the_curriculum_plans_for_a_group_have_the_same_noise() -> None:
    (own,) = load_tasks(ids=["write-a-word"])
    config = config_with(noise="heavy")
    group = Curriculum(config, {own.id: own.data}).train_group(4)
    planned = [
        rollout_pb2.Rollout(group_id=group.group_id, queue=group.queue, seed=seed, task_json=group.task_json)
        for seed in group.seeds
    ]
    assert len(set(group.seeds)) == config.tasks.num_rollouts
    assert len({add_rollout_noise(own, one, config).data for one in planned}) == 1


def test_each_episode_of_an_evaluation_has_noise_of_its_own_seed_at_the_level_of_evaluations() -> None:
    (own,) = load_tasks(ids=["write-a-word"])
    config = config_with(eval_noise="light")
    evaluated = [add_rollout_noise(own, rollout(member, "eval/before/000000"), config).data for member in range(8)]
    assert len(set(evaluated)) > 4
    assert {json.loads(data)["noise_meta"]["noise_level"] for data in evaluated} == {"light"}
    assert add_rollout_noise(own, rollout(0), config) is own, "training rollouts have none"
    assert add_rollout_noise(own, rollout(0, "eval/before/000000"), config_with(noise="heavy")) is own


def test_a_noisy_variant_keeps_the_domain_of_its_task() -> None:
    (own,) = load_tasks(ids=["write-a-word"])
    assert with_noise(own, "light", 0).domain == own.domain == "text_editor"


def test_noise_on_desktops_that_cannot_have_it_is_rejected_before_the_run() -> None:
    config = RunConfig.model_validate({"desktop": {"provider": "simulated"}, "tasks": {"eval_noise": "light"}})
    with pytest.raises(UserError, match=r"a simulated desktop cannot set it up \(tasks\.noise needs real desktops\)"):
        materialize_tasks.load(config)


def test_a_run_with_noise_writes_its_tasks_without_noise_and_a_corpus_with_it(tmp_path: Path) -> None:
    tasks = {"ids": ["write-a-word"], "noise": "heavy"}
    config = RunConfig.model_validate({"runs": tmp_path, "tasks": tasks})
    RunDir(config.run_dir).create()
    materialize_tasks.main(config)
    assert "noise_meta" not in RunDir(config.run_dir).tasks.read_text()
    assert "Close the message." in RunDir(config.run_dir).corpus.read_text()
