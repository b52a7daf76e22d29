"""`deskrl eval` and `deskrl compare`: statistics agree with hand calculation, and invalid input is rejected."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deskrl.analysis.evaluation.comparison import Comparison, compare, compare_counts, counts_by_task
from deskrl.analysis.evaluation.episode_records import (
    EvaluatedEpisode,
    EvaluatedTask,
    evaluated_episode,
    read_evaluation,
)
from deskrl.analysis.evaluation.evaluation_runner import EvaluationPlan, evaluation_config, plan_groups
from deskrl.analysis.evaluation.summary import pass_at_k, success_rate, summarise
from deskrl.analysis.evaluation.summary_table import print_summary
from deskrl.analysis.evaluation.task_sets import select_task_sets
from deskrl.core.config import ModelConfig, RunConfig, TasksConfig, dump_config, load_config
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.launch import gpu_assignment, preflight
from deskrl.launch.confidence_intervals import newcombe_difference, paired_difference, wilson_interval
from deskrl.proto.v1 import replay_pb2, rollout_pb2

THRESHOLD = 0.5


def episode(reward: float | None, steps: int = 2, seconds: float = 4.0) -> EvaluatedEpisode:
    fault = "" if reward is not None else "the desktop crashed"
    ended = "finished" if reward is not None else "fault"
    timings = tuple({"act": 100.0 * number} for number in range(1, steps + 1))
    return EvaluatedEpisode("e", 0, reward, ended, steps, seconds, timings, ("base/0",), ("click",) * steps, (), fault)


def task(name: str, application: str, *rewards: float | None, infeasible: bool = False) -> EvaluatedTask:
    return EvaluatedTask(name, application, infeasible, tuple(episode(reward) for reward in rewards))


RECORDS = [
    task("a", "os", 1.0),
    task("b", "os", 0.0),
    task("c", "gimp", 1.0),
    task("d", "gimp", None),
    task("e", "gimp", 1.0, infeasible=True),
]


def test_a_fault_is_counted_but_is_part_of_no_rate() -> None:
    rate = success_rate(RECORDS, THRESHOLD)
    assert (rate.num_tasks, rate.num_episodes, rate.num_successes, rate.num_faulted) == (5, 4, 3, 1)
    assert (rate.rate, rate.average_reward) == (0.75, 0.75)
    assert (rate.low, rate.high) == wilson_interval(3, 4)


def test_repeats_of_a_task_are_no_independent_trials() -> None:
    rate = success_rate([task("a", "os", 1.0, 1.0, 0.0, 0.0), task("b", "os", 1.0, 1.0)], THRESHOLD)
    assert (rate.num_episodes, rate.num_successes, rate.rate) == (6, 4, 4 / 6)
    assert (rate.low, rate.high) == wilson_interval(1.5, 2)


def test_infeasible_tasks_and_applications_have_rates_of_their_own() -> None:
    summary = summarise(RECORDS, THRESHOLD)
    assert (summary["all"]["num_successes"], summary["feasible"]["num_successes"]) == (3, 2)
    assert (summary["infeasible"]["num_tasks"], summary["infeasible"]["rate"]) == (1, 1.0)
    assert {name: rate["num_successes"] for name, rate in summary["applications"].items()} == {"gimp": 2, "os": 1}
    assert summary["terminations"] == {"finished": 4, "fault": 1}
    assert (summary["steps_per_episode"], summary["seconds_per_episode"]) == (2.0, 4.0)
    assert summary["timings_ms"] == {"act": {"median": 150.0, "p90": 200.0}}
    assert summary["tasks"]["d"]["rate"] is None and summary["tasks"]["a"]["steps"] == 2
    assert summary["versions"] == ["base/0"]


def stored_episode(*versions: int, reward: float = 1.0) -> replay_pb2.Episode:
    """Return an episode whose steps were sampled by these versions of the policy."""
    steps = [
        encode_step(Step(index, "seen", ("seen",), "click", action_ids=(1, 2), logprobs=(0.0, 0.0), spans=spans))
        for index, spans in enumerate((VersionSpan("base", version, 0, 2),) for version in versions)
    ]
    result = rollout_pb2.EpisodeResult(reward=reward, termination=rollout_pb2.TERMINATION_FINISHED)
    return replay_pb2.Episode(episode_id="e", seed=7, steps=steps, result=result)


def test_an_episode_in_which_another_version_acted_does_not_count() -> None:
    own, mixed, failed = (
        evaluated_episode(e, "base/0")
        for e in (stored_episode(0, 0), stored_episode(0, 1), stored_episode(1, reward=0.0))
    )
    assert (own.reward, own.termination, own.fault) == (1.0, "finished", "")
    for other in (mixed, failed):
        assert (other.reward, other.termination) == (None, "other_version")
        assert other.fault == "policy version base/1 acted instead of the evaluated base/0"
    summary = summarise([EvaluatedTask("a", "os", False, (own, mixed, failed))], THRESHOLD)
    assert (summary["all"]["num_episodes"], summary["all"]["num_successes"], summary["all"]["num_faulted"]) == (1, 1, 2)
    assert summary["uncounted"] == {"other_version": 2} and summary["versions"] == ["base/0"]


def test_without_a_known_version_every_episode_counts() -> None:
    assert evaluated_episode(stored_episode(0, 1), None).reward == 1.0


def test_an_episode_without_a_result_is_a_fault_with_its_last_message() -> None:
    fault = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_EVALUATOR, message="it raised")
    record = evaluated_episode(replay_pb2.Episode(episode_id="e", last_fault=fault), "base/0")
    assert (record.reward, record.termination, record.fault) == (None, "fault", "it raised")


def compare_records(a: list[EvaluatedTask], b: list[EvaluatedTask], threshold: float) -> Comparison:
    return compare_counts(counts_by_task(a, threshold), counts_by_task(b, threshold))


def test_one_shared_task_is_compared_as_two_proportions() -> None:
    compared = compare_records(
        [task("a", "os", 0.0, 1.0), task("x", "os", 1.0)], [task("a", "os", 1.0, 1.0)], THRESHOLD
    )
    assert (compared.num_paired, compared.num_better, compared.num_worse) == (1, 1, 0)
    assert (compared.difference, compared.low, compared.high) == newcombe_difference(1, 2, 2, 2)


def test_shared_tasks_are_paired() -> None:
    before = [task("a", "os", 0.0, 0.0), task("b", "os", 1.0, 0.0), task("c", "os", 1.0), task("x", "os", 1.0)]
    after = [task("a", "os", 1.0, 1.0), task("b", "os", 1.0, 1.0), task("c", "os", 0.0), task("y", "os", 0.0)]
    compared = compare_records(before, after, THRESHOLD)
    assert (compared.num_paired, compared.num_better, compared.num_worse) == (3, 2, 1)
    assert compared.difference == pytest.approx((1.0 + 0.5 - 1.0) / 3)
    assert -1.0 <= compared.low < compared.difference < compared.high <= 1.0


def test_a_task_with_only_faults_on_one_side_is_not_paired() -> None:
    compared = compare_records([task("a", "os", None), task("b", "os", 0.0)], [task("a", "os", 1.0)], THRESHOLD)
    assert not compared.paired
    assert (compared.difference, compared.low, compared.high) == newcombe_difference(0, 1, 1, 1)


def write_evaluation(root: Path, records: list[EvaluatedTask]) -> Path:
    (root / "results" / "task_results").mkdir(parents=True)
    dump_config(RunConfig(), root / "config.json")
    for record in records:
        (root / "results" / "task_results" / f"{record.task_id}.json").write_text(json.dumps(asdict(record)))
    return root


def test_two_evaluations_are_compared_by_application(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_evaluation(tmp_path / "a", [task("a", "os", 0.0), task("b", "gimp", 1.0)])
    b = write_evaluation(tmp_path / "b", [task("a", "os", 1.0), task("b", "gimp", 1.0)])
    assert read_evaluation(a)[0].task_id == "a"
    assert compare(a, b, as_document=True) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: part["difference"] for name, part in document.items()} == {
        "all": 0.5,
        "feasible": 0.5,
        "gimp": 0.0,
        "os": 1.0,
    }


def test_task_sets_are_compared_one_by_one_and_with_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rewards in (("a", (0.0, 1.0)), ("b", (1.0, 1.0))):
        for set_name, reward in zip(("plain", "plain-noisy"), rewards, strict=True):
            write_evaluation(tmp_path / name / "sets" / set_name, [task("t", "os", reward)])
    a, b = tmp_path / "a", tmp_path / "b"
    assert compare(a, b, as_document=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert {name: part["difference"] for name, part in document.items() if name.endswith("all")} == {
        "plain: all": 1.0,
        "plain-noisy: all": 0.0,
    }
    assert compare(a / "sets" / "plain", a / "sets" / "plain-noisy") == 0
    assert "a/plain-noisy" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"have no task set in common, .* \(hint: name two of .*a/"):
        compare(a, write_evaluation(tmp_path / "alone", RECORDS))


def test_equal_task_lists_are_compared_whatever_the_number_and_the_names_of_the_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [task("t", "os", 1.0), task("u", "os", 0.0)]
    single = write_evaluation(tmp_path / "single", tasks)
    for name in ("held_out", "other"):
        write_evaluation(tmp_path / "several" / "sets" / name, tasks if name == "other" else [task("x", "os", 1.0)])
    assert compare(single, tmp_path / "several", as_document=True) == 0
    assert json.loads(capsys.readouterr().out)["single: all"]["num_paired"] == 2
    # The manifest names the only set of an evaluation, which has the directory of the evaluation.
    (single / "evaluation.json").write_text(json.dumps({"sets": {"held_out": {}}}))
    assert compare(single, tmp_path / "several") == 0
    output = capsys.readouterr().out
    assert "held_out: all" in output and "not compared: other" in output
    renamed = write_evaluation(tmp_path / "renamed", [*tasks, task("v", "os", 1.0)])
    assert compare(single, renamed) == 0
    assert "1 of 3 tasks of renamed have no counterpart and are not compared" in capsys.readouterr().out


@pytest.mark.parametrize(("outcomes", "num_tasks"), [((1.0,), 3), ((0.0,), 3), ((1.0, 0.0), 3), ((1.0,), 40)])
def test_the_interval_of_equal_evaluations_is_not_empty(outcomes: tuple[float, ...], num_tasks: int) -> None:
    records = [task(f"t{number}", "os", *outcomes) for number in range(num_tasks)]
    compared = compare_records(records, records, THRESHOLD)
    assert compared.difference == 0
    half = 0.45 if num_tasks == 3 else 0.05
    assert compared.low <= -half and compared.high >= half


def test_the_paired_interval_of_binary_outcomes_is_newcombe_s() -> None:
    # Both: 9, A only: 1, B only: 4, neither: 6. Computed by hand from Wilson's intervals of 10/20 and 13/20 and the
    # corrected correlation (9 * 6 - 1 * 4 - 10) / sqrt(10 * 10 * 13 * 7).
    a, b = [1.0] * 10 + [0.0] * 10, [1.0] * 9 + [0.0] + [1.0] * 4 + [0.0] * 6
    difference, low, high = paired_difference(a, b, (20, 20))
    assert (difference, low, high) == pytest.approx((0.15, -0.0755, 0.3509), abs=1e-4)


def test_a_missing_directory_and_one_without_results_are_no_evaluation(tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "eval", RECORDS)
    with pytest.raises(UserError, match=r"gone: not found \(hint: name the directory of a run or of an evaluation"):
        compare(evaluation, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: contains neither a run nor an evaluation"):
        compare(tmp_path / "empty", evaluation)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="begun: the evaluation has not finished"):
        compare(evaluation, tmp_path / "begun")


def test_pass_at_k_is_estimated_without_bias_and_has_an_interval_over_tasks() -> None:
    records = [task("a", "os", 1.0, 0.0, 0.0, 0.0), task("b", "os", 1.0, 1.0, 1.0, 1.0), task("c", "os", 0.0, None)]
    rates = pass_at_k(records, THRESHOLD)
    assert list(rates) == [1, 2, 4]
    assert rates[1].rate == pytest.approx((1 / 4 + 1 + 0) / 3) and rates[1].num_tasks == 3
    assert rates[2].rate == pytest.approx((1 / 2 + 1) / 2) and rates[2].num_tasks == 2
    assert (rates[4].low, rates[4].high) == wilson_interval(2, 2)
    assert pass_at_k([task("a", "os", None)], THRESHOLD) == {}


def test_an_external_server_is_evaluated_with_the_configuration_of_any_number_of_gpus() -> None:
    options = ["--inference.external_url=http://127.0.0.1:9000/v1", "--inference.external_model=m"]
    for path in sorted((Path(__file__).parents[2] / "deploy" / "runs").glob("*.toml")):
        preflight.check_consistency(evaluation_config(load_config(path, options), None, "judged"))
    devices = {"devices": [0, 1], "num_replicas": 2, "quantization": "int4", "weight_transfer": "nccl"}
    external = {"external_url": "http://127.0.0.1:9000/v1", "external_model": "m"}
    config = RunConfig.model_validate({"inference": {**devices, **external}})
    preflight.check_consistency(evaluation_config(config, None, "judged"))


def test_the_summary_counts_every_task_that_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = {"f": ["application vlc is not installed"], "g": ["application vlc is not installed", "network"]}
    summary = summarise([*RECORDS, task("r", "os", 1.0, 0.0)], THRESHOLD) | {"left_out": left_out}
    print_summary(summary, RunDir(tmp_path / "judged"))
    output = capsys.readouterr().out
    counts = {line.split()[-1] for line in output.splitlines() if line.strip().startswith("application vlc")}
    assert counts == {"2"}
    assert "2 of 8 tasks were left out" in output and "pass@2 100% [" in output
    rows = {name.strip(): number for name, _, number in (line.strip().rpartition(" ") for line in output.splitlines())}
    assert (rows["listed"], rows["evaluated"], rows["without an episode that counts"]) == ("8", "5", "1")
    print_summary(summary | {"left_out": {}}, RunDir(tmp_path / "judged"))
    assert "none of the 6 tasks was left out" in capsys.readouterr().out


def test_a_directory_without_an_evaluation_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "results" / "task_results").mkdir(parents=True)
    (tmp_path / "results" / "task_results" / "t.json").write_text('{"written by": "a training run"}')
    with pytest.raises(UserError, match=r"contains no evaluation \(hint: name a directory that `deskrl eval`"):
        read_evaluation(tmp_path)


def test_an_evaluation_repeats_each_task_with_seeds_of_its_own(tmp_path: Path) -> None:
    config = evaluation_config(RunConfig(seed=3), tmp_path, "judged")
    assert config.model == ModelConfig(path=tmp_path.resolve())
    assert config.tasks.unmet_requirements == "reject", "no task is left out without being asked"
    plan, tasks = EvaluationPlan(repeats=3, temperature=0.6), {"a": {"id": "a"}, "b": {"id": "b"}}
    groups = plan_groups(config, plan, tasks, "eval/x")
    assert [(group.task_id, len(group.seeds), group.queue) for group in groups] == [
        ("a", 3, "eval/x"),
        ("b", 3, "eval/x"),
    ]
    assert len({seed for group in groups for seed in group.seeds}) == 6
    assert groups == plan_groups(config, plan, tasks, "eval/x")
    other_set = plan_groups(config, plan, tasks, "eval/y")
    assert [group.seeds for group in groups] == [group.seeds for group in other_set]
    assert not {group.group_id for group in groups} & {group.group_id for group in other_set}


def test_the_replicas_of_an_evaluation_may_use_the_gpus_of_the_learner(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"learner": {"devices": [0]}, "inference": {"devices": [0], "weight_transfer": "nccl"}}
    )
    with pytest.raises(UserError):
        gpu_assignment.check_gpus_exist(config, num_gpus=1)
    evaluation = evaluation_config(config, tmp_path, "judged")
    gpu_assignment.check_gpus_exist(evaluation, num_gpus=1)
    assert list(gpu_assignment.contradictions(config)) and not list(gpu_assignment.contradictions(evaluation))


def test_a_single_task_set_has_the_directory_of_the_evaluation_and_several_have_one_each(tmp_path: Path) -> None:
    config = RunConfig(runs=tmp_path, name="judged", tasks=TasksConfig(ids=("a",)))
    own, (listed,) = (
        select_task_sets([], None)[0],
        select_task_sets([tmp_path / "all.json"], None, tmp_path / "files", "_x"),
    )
    assert own.apply_to(config, is_only=True) == config
    single, one_of_several = listed.apply_to(config, is_only=True), listed.apply_to(config, is_only=False)
    assert (
        single.tasks
        == one_of_several.tasks
        == TasksConfig(list=tmp_path / "all.json", root=tmp_path / "files", suffix="_x")
    )
    assert (single.run_dir, one_of_several.run_dir) == (config.run_dir, config.run_dir / "sets" / "all")
    assert RunConfig.model_validate_json(one_of_several.model_dump_json()) == one_of_several


def test_noisy_variants_are_a_task_set_of_their_own(tmp_path: Path) -> None:
    plain, held_out = tmp_path / "plain.json", tmp_path / "more" / "held out.json"
    sets = select_task_sets([plain, held_out], [])
    assert [one.name for one in sets] == ["plain", "held-out", "plain-noisy", "held-out-noisy"]
    assert [one.root for one in sets] == [None, None, tmp_path / "examples_noisy", tmp_path / "more" / "examples_noisy"]
    assert [one.suffix for one in sets] == [None, None, "_noise", "_noise"]
    assert [one.name for one in select_task_sets([plain, held_out], [plain])] == ["plain", "held-out", "plain-noisy"]
    assert [one.name for one in select_task_sets([], [plain])] == ["plain-noisy"]


def test_task_sets_with_one_name_and_options_without_a_list_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two task sets have the name all \(hint: give each list a different"):
        select_task_sets([tmp_path / "all.json", tmp_path / "other" / "all.json"], None)
    with pytest.raises(UserError, match=r"--noisy needs task lists \(hint: name them"):
        select_task_sets([], [])
    with pytest.raises(UserError, match=r"need a task list \(hint: name it with --tasks"):
        select_task_sets([], [tmp_path / "all.json"], root=tmp_path)


def write_run(root: Path, *updates: tuple[int, dict[str, tuple[int, int]]], **learner: Any) -> Path:
    """Write a run directory; each update has environment steps and, by task, successes and episodes."""
    folder = RunDir(root)
    folder.create()
    dump_config(RunConfig.model_validate({"name": root.name, "learner": learner}), folder.config)
    folder.append_metrics("phase", phase="training")
    for number, (steps, tasks) in enumerate(updates, start=1):
        per_task = {task: {"success": success, "n": n} for task, (success, n) in tasks.items()}
        folder.append_metrics("update", update=number, num_env_steps=steps, per_task=per_task, seconds={"wait": 60.0})
    return root


def test_two_runs_are_compared_at_equal_environment_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", (50, {"x": (0, 4), "y": (1, 4)}), (50, {"x": (2, 4)}), (90, {"x": (4, 4)}))
    b = write_run(
        tmp_path / "b", (80, {"x": (3, 4), "y": (3, 4)}), (20, {"y": (4, 4)}), grpo={"importance_weighting": "off"}
    )
    assert compare(a, b, as_document=True) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(document) == ["training", "last quarter", "  x", "  y"]
    # x: 2 of 8 and 3 of 4; y: 1 of 4 and 7 of 8.
    assert document["training"]["num_paired"] == 2
    assert document["training"]["difference"] == pytest.approx((0.5 + 0.625) / 2)
    # Updates that end in it: x: 2 of 4 and 3 of 4; A has none of y.
    assert (document["last quarter"]["num_paired"], document["last quarter"]["difference"]) == (1, 0.25)
    assert document["  x"]["low"] == pytest.approx(newcombe_difference(2, 8, 3, 4)[1])
    assert compare(a, b) == 0
    text = capsys.readouterr().out
    assert "the first 100 environment steps of each" in text
    assert "different configuration keys: learner.grpo.importance_weighting\n" in text
    assert "a: 3 updates, 190 environment steps in 3.0 min of training" in text


def test_a_run_and_an_evaluation_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (50, {"x": (0, 4)}))
    with pytest.raises(UserError, match=r"run is a run, but .*eval is an evaluation \(hint: name two runs or"):
        compare(write_evaluation(tmp_path / "eval", RECORDS), run)


def test_a_run_without_an_update_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new: the run has no update yet"):
        compare(write_run(tmp_path / "new"), write_run(tmp_path / "run", (50, {"x": (0, 4)})))
