"""Evaluations counted and compared, against numbers worked out by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deskrl.core import devices
from deskrl.core.config import ModelConfig, RunConfig, TasksConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.evaluation import comparison
from deskrl.core.evaluation.comparison import Comparison, compare_counts, counts_of
from deskrl.core.evaluation.play import Plan, configure, plan_groups
from deskrl.core.evaluation.record import EpisodeRecord, TaskRecord, read_records, record_of
from deskrl.core.evaluation.sets import choose_sets
from deskrl.core.evaluation.summary import success_rate, summarise
from deskrl.core.runfolder import RunFolder
from deskrl.core.stats import newcombe_difference, wilson_interval
from deskrl.core.trajectory import Span, Step, encode_step
from deskrl.proto.v1 import replay_pb2, rollout_pb2

ABOVE = 0.5


def episode(reward: float | None, steps: int = 2, seconds: float = 4.0) -> EpisodeRecord:
    fault = "" if reward is not None else "the desktop died"
    ended = "finished" if reward is not None else "fault"
    timings = tuple({"act": 100.0 * number} for number in range(1, steps + 1))
    return EpisodeRecord("e", 0, reward, ended, steps, seconds, timings, ("base/0",), ("click",) * steps, (), fault)


def task(name: str, application: str, *rewards: float | None, infeasible: bool = False) -> TaskRecord:
    return TaskRecord(name, application, infeasible, tuple(episode(reward) for reward in rewards))


RECORDS = [
    task("a", "os", 1.0),
    task("b", "os", 0.0),
    task("c", "gimp", 1.0),
    task("d", "gimp", None),
    task("e", "gimp", 1.0, infeasible=True),
]


def test_a_fault_is_counted_and_stands_in_no_rate() -> None:
    rate = success_rate(RECORDS, ABOVE)
    assert (rate.num_tasks, rate.num_episodes, rate.num_successes, rate.num_faulted) == (5, 4, 3, 1)
    assert (rate.rate, rate.average_reward) == (0.75, 0.75)
    assert (rate.low, rate.high) == wilson_interval(3, 4)


def test_repeats_of_a_task_make_no_further_trials() -> None:
    rate = success_rate([task("a", "os", 1.0, 1.0, 0.0, 0.0), task("b", "os", 1.0, 1.0)], ABOVE)
    assert (rate.num_episodes, rate.num_successes, rate.rate) == (6, 4, 4 / 6)
    assert (rate.low, rate.high) == wilson_interval(1.5, 2)


def test_infeasible_tasks_stand_apart_and_applications_by_themselves() -> None:
    told = summarise(RECORDS, ABOVE)
    assert (told["all"]["num_successes"], told["feasible"]["num_successes"]) == (3, 2)
    assert (told["infeasible"]["num_tasks"], told["infeasible"]["rate"]) == (1, 1.0)
    assert {name: rate["num_successes"] for name, rate in told["applications"].items()} == {"gimp": 2, "os": 1}
    assert told["terminations"] == {"finished": 4, "fault": 1}
    assert (told["steps_per_episode"], told["seconds_per_episode"]) == (2.0, 4.0)
    assert told["timings_ms"] == {"act": {"median": 150.0, "p90": 200.0}}
    assert told["tasks"]["d"]["rate"] is None and told["tasks"]["a"]["steps"] == 2
    assert told["versions"] == ["base/0"]


def played(*versions: int, reward: float = 1.0) -> replay_pb2.Episode:
    """An episode off the wire, whose steps were sampled under these steps of a lineage."""
    steps = [
        encode_step(Step(index, "seen", ("seen",), "click", action_ids=(1, 2), logprobs=(0.0, 0.0), spans=spans))
        for index, spans in enumerate((Span("base", version, 0, 2),) for version in versions)
    ]
    result = rollout_pb2.EpisodeResult(reward=reward, termination=rollout_pb2.TERMINATION_FINISHED)
    return replay_pb2.Episode(episode_id="e", seed=7, steps=steps, result=result)


def test_an_episode_in_which_another_version_acted_is_neither_success_nor_failure() -> None:
    own, mixed, failed = (record_of(e, "base/0") for e in (played(0, 0), played(0, 1), played(1, reward=0.0)))
    assert (own.reward, own.termination, own.fault) == (1.0, "finished", "")
    for other in (mixed, failed):
        assert (other.reward, other.termination) == (None, "other_version")
        assert other.fault == "base/1 acted, and base/0 is evaluated"
    told = summarise([TaskRecord("a", "os", False, (own, mixed, failed))], ABOVE)
    assert (told["all"]["num_episodes"], told["all"]["num_successes"], told["all"]["num_faulted"]) == (1, 1, 2)
    assert told["uncounted"] == {"other_version": 2} and told["versions"] == ["base/0"]


def test_a_server_that_tells_no_versions_is_taken_at_its_word() -> None:
    assert record_of(played(0, 1), None).reward == 1.0


def test_an_episode_without_a_result_is_a_fault_by_its_last_message() -> None:
    fault = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_EVALUATOR, message="it raised")
    record = record_of(replay_pb2.Episode(episode_id="e", last_fault=fault), "base/0")
    assert (record.reward, record.termination, record.fault) == (None, "fault", "it raised")


def compare_records(a: list[TaskRecord], b: list[TaskRecord], above: float) -> Comparison:
    return compare_counts(counts_of(a, above), counts_of(b, above))


def test_one_shared_task_alone_is_two_rates() -> None:
    compared = compare_records([task("a", "os", 0.0, 1.0), task("x", "os", 1.0)], [task("a", "os", 1.0, 1.0)], ABOVE)
    assert (compared.num_paired, compared.num_better, compared.num_worse) == (1, 1, 0)
    assert (compared.difference, compared.low, compared.high) == newcombe_difference(1, 2, 2, 2)


def test_shared_tasks_are_paired() -> None:
    before = [task("a", "os", 0.0, 0.0), task("b", "os", 1.0, 0.0), task("c", "os", 1.0), task("x", "os", 1.0)]
    after = [task("a", "os", 1.0, 1.0), task("b", "os", 1.0, 1.0), task("c", "os", 0.0), task("y", "os", 0.0)]
    compared = compare_records(before, after, ABOVE)
    assert (compared.num_paired, compared.num_better, compared.num_worse) == (3, 2, 1)
    assert compared.difference == pytest.approx((1.0 + 0.5 - 1.0) / 3)
    assert -1.0 <= compared.low < compared.difference < compared.high <= 1.0


def test_a_task_that_only_faulted_on_one_side_is_no_pair() -> None:
    compared = compare_records([task("a", "os", None), task("b", "os", 0.0)], [task("a", "os", 1.0)], ABOVE)
    assert not compared.paired
    assert (compared.difference, compared.low, compared.high) == newcombe_difference(0, 1, 1, 1)


def kept(root: Path, records: list[TaskRecord]) -> Path:
    (root / "results" / "task_results").mkdir(parents=True)
    dump_config(RunConfig(), root / "config.json")
    for record in records:
        (root / "results" / "task_results" / f"{record.task_id}.json").write_text(json.dumps(asdict(record)))
    return root


def test_two_folders_are_compared_by_application(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = kept(tmp_path / "a", [task("a", "os", 0.0), task("b", "gimp", 1.0)])
    b = kept(tmp_path / "b", [task("a", "os", 1.0), task("b", "gimp", 1.0)])
    assert read_records(a)[0].task_id == "a"
    assert comparison.main(a, b, as_document=True) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: part["difference"] for name, part in told.items()} == {
        "all": 0.5,
        "feasible": 0.5,
        "gimp": 0.0,
        "os": 1.0,
    }


def test_sets_are_compared_one_by_one_and_with_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rewards in (("a", (0.0, 1.0)), ("b", (1.0, 1.0))):
        for set_name, reward in zip(("plain", "plain-noisy"), rewards, strict=True):
            kept(tmp_path / name / "sets" / set_name, [task("t", "os", reward)])
    a, b = tmp_path / "a", tmp_path / "b"
    assert comparison.main(a, b, as_document=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: part["difference"] for name, part in told.items() if name.endswith("all")} == {
        "plain: all": 1.0,
        "plain-noisy: all": 0.0,
    }
    assert comparison.main(a / "sets" / "plain", a / "sets" / "plain-noisy") == 0
    assert "a/plain-noisy" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no set of tasks in common; name one of .*a/sets/plain, "):
        comparison.main(a, kept(tmp_path / "alone", RECORDS))


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results" / "task_results").mkdir(parents=True)
    (tmp_path / "results" / "task_results" / "t.json").write_text('{"a training run": "has others"}')
    with pytest.raises(UserError, match="holds no evaluation; name a folder that `deskrl eval` has written"):
        read_records(tmp_path)


def test_an_evaluation_plays_each_task_so_often_under_seeds_of_its_own(tmp_path: Path) -> None:
    config = configure(RunConfig(seed=3), tmp_path, "judged")
    assert config.model == ModelConfig(path=tmp_path.resolve()) and config.tasks.unplayable == "skip"
    plan, tasks = Plan(repeats=3, temperature=0.6), {"a": {"id": "a"}, "b": {"id": "b"}}
    groups = plan_groups(config, plan, tasks, "eval/x")
    assert [(group.task_id, len(group.seeds), group.queue) for group in groups] == [
        ("a", 3, "eval/x"),
        ("b", 3, "eval/x"),
    ]
    assert len({seed for group in groups for seed in group.seeds}) == 6
    assert groups == plan_groups(config, plan, tasks, "eval/x")
    of_other_set = plan_groups(config, plan, tasks, "eval/y")
    assert [group.seeds for group in groups] == [group.seeds for group in of_other_set]
    assert not {group.group_id for group in groups} & {group.group_id for group in of_other_set}


def test_whoever_acts_in_an_evaluation_may_have_the_gpu_that_learning_had(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"learner": {"devices": [0]}, "inference": {"devices": [0], "weight_transfer": "nccl"}}
    )
    with pytest.raises(UserError):
        devices.refuse_missing(config, num_gpus=1)
    alone = configure(config, tmp_path, "judged")
    devices.refuse_missing(alone, num_gpus=1)
    assert list(devices.contradictions(config)) and not list(devices.contradictions(alone))


def test_one_set_has_the_evaluations_folder_and_each_of_several_one_below(tmp_path: Path) -> None:
    config = RunConfig(runs=tmp_path, name="judged", tasks=TasksConfig(tasks=("a",)))
    own, (listed,) = choose_sets([], None)[0], choose_sets([tmp_path / "all.json"], None, tmp_path / "files", "_x")
    assert own.settle_in(config, alone=True) == config
    alone, beside = listed.settle_in(config, alone=True), listed.settle_in(config, alone=False)
    assert alone.tasks == beside.tasks == TasksConfig(list=tmp_path / "all.json", root=tmp_path / "files", suffix="_x")
    assert (alone.folder, beside.folder) == (config.folder, config.folder / "sets" / "all")
    assert RunConfig.model_validate_json(beside.model_dump_json()) == beside


def test_noisy_variants_are_a_set_of_their_own_beside_their_list(tmp_path: Path) -> None:
    plain, held_out = tmp_path / "plain.json", tmp_path / "more" / "held out.json"
    sets = choose_sets([plain, held_out], [])
    assert [one.name for one in sets] == ["plain", "held-out", "plain-noisy", "held-out-noisy"]
    assert [one.root for one in sets] == [None, None, tmp_path / "examples_noisy", tmp_path / "more" / "examples_noisy"]
    assert [one.suffix for one in sets] == [None, None, "_noise", "_noise"]
    assert [one.name for one in choose_sets([plain, held_out], [plain])] == ["plain", "held-out", "plain-noisy"]
    assert [one.name for one in choose_sets([], [plain])] == ["plain-noisy"]


def test_sets_that_could_not_be_told_apart_or_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two sets of tasks would be called all; give each list a file name"):
        choose_sets([tmp_path / "all.json", tmp_path / "other" / "all.json"], None)
    with pytest.raises(UserError, match="--noisy is about task lists; name them"):
        choose_sets([], [])
    with pytest.raises(UserError, match="there are none; name a list"):
        choose_sets([], [tmp_path / "all.json"], root=tmp_path)


def trained(root: Path, *updates: tuple[int, dict[str, tuple[int, int]]], **learner: Any) -> Path:
    """A run's folder with updates of so many environment steps and, by task, successes among episodes."""
    folder = RunFolder(root)
    folder.create()
    dump_config(RunConfig.model_validate({"name": root.name, "learner": learner}), folder.config)
    folder.append_metrics("phase", phase="training")
    for number, (steps, tasks) in enumerate(updates, start=1):
        per_task = {task: {"success": success, "n": n} for task, (success, n) in tasks.items()}
        folder.append_metrics("update", update=number, num_env_steps=steps, per_task=per_task, seconds={"wait": 60.0})
    return root


def test_two_runs_are_compared_over_as_many_steps_as_both_have_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = trained(tmp_path / "a", (50, {"x": (0, 4), "y": (1, 4)}), (50, {"x": (2, 4)}), (90, {"x": (4, 4)}))
    b = trained(tmp_path / "b", (80, {"x": (3, 4), "y": (3, 4)}), (20, {"y": (4, 4)}), grpo={"importance": "off"})
    assert comparison.main(a, b, as_document=True) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(told) == ["training", "last quarter", "  x", "  y"]
    # x: 2 of 8 and 3 of 4; y: 1 of 4 and 7 of 8.
    assert told["training"]["num_paired"] == 2
    assert told["training"]["difference"] == pytest.approx((0.5 + 0.625) / 2)
    # Updates that end there: x: 2 of 4 and 3 of 4; y was not played by the first.
    assert (told["last quarter"]["num_paired"], told["last quarter"]["difference"]) == (1, 0.25)
    assert told["  x"]["low"] == pytest.approx(newcombe_difference(2, 8, 3, 4)[1])
    monkeypatch.setenv("COLUMNS", "160")
    assert comparison.main(a, b) == 0
    told_text = capsys.readouterr().out
    assert "the first 100 environment steps of each" in told_text
    assert "configured differently: learner.grpo.importance\n" in told_text
    assert "a: 3 updates, 190 environment steps in 3.0 min of training" in told_text


def test_a_run_and_an_evaluation_are_not_compared(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", (50, {"x": (0, 4)}))
    with pytest.raises(UserError, match=r"run is a run and .*eval an evaluation; name two runs, or two evaluations"):
        comparison.main(kept(tmp_path / "eval", RECORDS), run)


def test_a_run_that_has_not_learnt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new has not learnt yet"):
        comparison.main(trained(tmp_path / "new"), trained(tmp_path / "run", (50, {"x": (0, 4)})))
