"""The learner as a process, with a real replay service, a toy actor and toy replicas: runs, stops and resumed runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from learner_kit import TASKS, ToyPolicy, build_model, screenshot
from learner_peers_kit import ToyActor, ToyReplica
from ports_kit import free_port
from replay_kit import ReplayProcess
from safetensors.torch import load_file

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstration_rendering import render_demonstrations
from deskrl.actor.demonstrations import (
    Demonstration,
    DemonstrationStep,
    Player,
    create_folder,
    write_demonstration,
    write_screenshot,
)
from deskrl.cli.main import main
from deskrl.core import ids, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.presets import PRESETS
from deskrl.core.process_lifecycle import STOPPED_STATUS
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import decode_step
from deskrl.launch.acceptance import expected_of, success_buffer_criterion
from deskrl.learner.batches.token_stats import read_token_stats
from deskrl.learner.curriculum import TRAIN
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc, rollout_pb2

_DEADLINE_S = 240.0


class ToyRun:
    """One run: replay service, toy actor and replicas, and a learner that can be started repeatedly."""

    def __init__(
        self,
        root: Path,
        num_replicas: int = 1,
        tracker: Sequence[str] = (),
        reward_of: Callable[[rollout_pb2.Rollout], float] | None = None,
        **learner: Any,
    ) -> None:
        port = free_port()
        self.config = RunConfig.model_validate(
            {
                "runs": root,
                "name": "toy",
                "tracker": tracker,
                "tasks": {"num_rollouts": 4, "max_steps": 3},
                "agent": {"image_width": 112, "image_height": 112},
                "replay": {"address": f"127.0.0.1:{free_port()}"},
                "inference": {"address": f"127.0.0.1:{port}", "dtype": "float32", "num_replicas": num_replicas},
                "learner": {"dtype": "float32", **learner},
            }
        )
        self.folder = RunDir(self.config.run_dir)
        self.replay = ReplayProcess(self.config)
        build_model(self.config.model_folder)
        # As if the run started from the checkpoint of another run, whose training state must be ignored.
        (self.config.model_folder / "learner.json").write_text('{"schema": 1, "num_updates": 7, "state": {}}')
        (self.folder.tasks).write_text(json.dumps(TASKS))
        self.replicas = [
            ToyReplica(f"127.0.0.1:{port + index}", self.config.model_folder, root) for index in range(num_replicas)
        ]
        self.actor: ToyActor | None = ToyActor(self.replay.client(), self.replicas[0], reward_of)
        self._config_path = self.folder.config
        self._learners: list[subprocess.Popen[str]] = []

    def start(self, **learner: Any) -> subprocess.Popen[str]:
        """Start the learner; keyword arguments override keys of its configuration section."""
        merged = self.config.model_dump(mode="json")
        merged["learner"] |= learner
        dump_config(RunConfig.model_validate(merged), self._config_path)
        command = [sys.executable, "-m", "deskrl.cli.main", "learner", str(self._config_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._learners.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return self._learners[-1]

    def finish(self, learner: subprocess.Popen[str], status: int = 0) -> str:
        """Wait until the learner ends with an exit status; return its log."""
        _, log = learner.communicate(timeout=_DEADLINE_S)
        assert learner.returncode == status, log[-3000:]
        return log

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        return list(self.folder.read_metrics(kind))

    def wait_for(self, condition: Callable[[], bool], learner: subprocess.Popen[str]) -> None:
        """Wait for a condition; fail if the learner ends before it is true."""
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            assert learner.poll() is None, learner.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "the condition did not become true in time"
            time.sleep(0.02)

    def join(self) -> ToyReplica:
        """Start a replica that the configuration does not name."""
        self.replicas.append(ToyReplica(f"127.0.0.1:{free_port()}", self.config.model_folder, self.config.runs))
        return self.replicas[-1]

    def announce(self, replica: ToyReplica, is_leaving: bool = False) -> None:
        """Announce a replica to the directory, as replicas that joined do regularly."""
        request = directory_pb2.AnnounceRequest(
            peer=rpc.peer("inference", "toy"), address=replica.address, is_leaving=is_leaving
        )
        with rpc.connect_sync(self.config.replay.address) as channel:
            directory_pb2_grpc.DirectoryServiceStub(channel).Announce(request, timeout=60)

    def stop_actor(self) -> None:
        if self.actor is not None:
            self.actor.close()
            self.actor = None

    def close(self) -> None:
        for learner in self._learners:
            if learner.poll() is None:
                learner.kill()
                learner.communicate()
        self.stop_actor()
        for replica in self.replicas:
            replica.close()
        self.replay.close()


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., ToyRun]]:
    """Function that prepares a run with the given learner settings."""
    runs: list[ToyRun] = []

    def make(**settings: Any) -> ToyRun:
        runs.append(ToyRun(tmp_path / str(len(runs)), **settings))
        return runs[-1]

    yield make
    for each in runs:
        each.close()


MAX_ENV_STEPS = 17
GRPO = {"num_updates": 3, "groups_per_batch": 2, "learning_rate": 1e-3, "max_staleness": 1}
WARM_START = {"demos_per_task": 2, "stop_likelihood": 0.2, "max_updates": 60}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyRun]:
    """Finished run with warm start, training and evaluations."""
    run = ToyRun(tmp_path_factory.mktemp("full"), grpo=GRPO, warm_start=WARM_START, eval={"num_episodes": 8})
    run.finish(run.start())
    yield run
    run.close()


def test_a_run_goes_through_all_phases_and_writes_metrics_results_and_checkpoints(full_run: ToyRun) -> None:
    run = full_run
    phases = [line["phase"] for line in run.metrics("phase")]
    assert phases == [
        "loading",
        "demonstrations",
        "imitation",
        "waiting for inference",
        "publishing",
        "eval/before",
        "training",
        "eval/after",
        "finished",
    ]
    assert run.metrics("imitation")[-1]["likelihood"] >= 0.2
    updates = run.metrics("update")
    assert [update["update"] for update in updates] == [1, 2, 3]
    assert all(update["num_episodes"] >= 8 for update in updates)
    compared = [update["mismatch_max"] for update in updates if update["mismatch_max"] is not None]
    assert all(mismatch < 1e-4 for mismatch in compared)
    evaluations = {line["when"]: line for line in run.metrics("eval")}
    for evaluation in evaluations.values():
        assert evaluation["episodes"] == 8
        assert evaluation["num_other_version"] == 0, "only one policy version acts during an evaluation"
        assert evaluation["mismatch_max"] < 1e-4
    assert evaluations["before"]["version"] == 0
    assert evaluations["after"]["version"] == 3
    weights = run.metrics("weights")
    assert [line["version"] for line in weights] == [0, 1, 2, 3]
    assert all(line["ok"] and line["canary_max_difference"] < 1e-4 for line in weights)
    check_results(run)
    check_checkpoints(run)
    check_token_stats(run, updates[-1])


def test_updates_are_reproduced_bit_for_bit_from_checkpoints_and_recorded_batches(
    full_run: ToyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints after updates 1 to 3 are kept, so updates 2 and 3 are reproduced; one record is manipulated."""
    run = full_run
    run.stop_actor()
    run.replay.stop()
    entropy = run.metrics("update")[-1]["entropy"]
    recorded = run.folder.metrics.read_text().replace(repr(entropy), repr(entropy + 1e-9))
    run.folder.metrics.write_text(recorded)
    before = {path: path.stat().st_mtime_ns for path in run.folder.checkpoints.rglob("*")}
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the learner had: the number of threads changes the order of sums
    assert main(["reproduce", str(run.folder.root)]) == 1
    output = capsys.readouterr().out
    assert re.search(r"│ 2 +│ epoch_0_update_1 .* yes +│ +│\n", output), output
    assert re.search(r"│ 3 +│ epoch_0_update_1 .* no ", output), output
    assert f"entropy {entropy + 1e-9!r}, {entropy!r}" in output
    assert "gradient_norm" not in output, "only keys that differ are listed"
    assert "not reproduced: update 1: no checkpoint before it is kept (learner.keep_checkpoints)" in output
    assert {path: path.stat().st_mtime_ns for path in run.folder.checkpoints.rglob("*")} == before


def test_the_arpo_preset_keeps_every_group_and_trains_synchronously(start_run: Callable[..., ToyRun]) -> None:
    arpo = PRESETS["arpo"]["learner"]["grpo"]
    ends = {"num_updates": 50, "max_env_steps": MAX_ENV_STEPS}
    run = start_run(grpo={**arpo, **ends, "groups_per_batch": 2, "learning_rate": 1e-3, "warmup_updates": 1})
    run.finish(run.start())
    updates = run.metrics("update")
    steps = [update["num_env_steps"] for update in updates]
    assert sum(steps[:-1]) < MAX_ENV_STEPS <= sum(steps), "the update that reaches max_env_steps is the last"
    assert all((update["num_trajectories"], update["dropped"]) == (8, {}) for update in updates)
    assert all(update["staleness_max"] == 0 for update in updates)
    assert [update["learning_rate"] for update in updates] == [0.0, *[1e-3] * (len(updates) - 1)]
    assert all(update["applied"] for update in updates)
    assert all(0 <= update["without_spread"] <= 2 for update in updates)


def test_every_group_that_fails_after_a_success_of_its_task_gets_a_stored_success(
    start_run: Callable[..., ToyRun],
) -> None:
    """In the first group of each task the first member succeeds; every later group fails."""

    def reward_of(rollout: rollout_pb2.Rollout) -> float:
        is_first_group = rollout.group_id in {ids.group_id(TRAIN, ordinal) for ordinal in range(len(TASKS))}
        return float(is_first_group and rollout.seed == ids.derive_seed(0, rollout.group_id, 0))

    settings = {"num_updates": 3, "groups_per_batch": len(TASKS), "max_staleness": 0, "learning_rate": 1e-3}
    run = start_run(grpo=settings, reward_of=reward_of)
    run.finish(run.start())
    updates = run.metrics("update")
    assert [update["replayed"] for update in updates] == [0, len(TASKS), len(TASKS)]
    assert all(update["dropped"] == {} for update in updates)
    criterion = success_buffer_criterion(updates, expected_of(run.config))
    assert criterion.ok
    assert criterion.value == f"used {2 * len(TASKS)} times, never withheld"


def test_recorded_demonstrations_are_imitated_and_the_checkpoint_is_a_model_folder(
    start_run: Callable[..., ToyRun], tmp_path: Path
) -> None:
    source = tmp_path / "demonstrations"
    for number, task_id in enumerate(TASKS):
        write_toy_demonstration(source / str(number), task_id)
    warm_start = {"demonstrations": source, "num_epochs": 8, "episodes_per_batch": 2, "learning_rate": 3e-3}
    run = start_run(grpo={**GRPO, "num_updates": 0}, warm_start=warm_start)
    render_demonstrations(run.config, source)
    run.finish(run.start())
    phases = [line["phase"] for line in run.metrics("phase")]
    assert phases == ["loading", "imitation", "waiting for inference", "publishing", "training", "finished"]
    imitation = run.metrics("imitation")
    assert len(imitation) == 8 * -(-len(TASKS) // 2)
    losses = [line["loss"] for line in imitation]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    newest = (run.folder.checkpoints / "latest").resolve()
    before, after = (load_file(folder / "model.safetensors") for folder in (run.config.model_folder, newest))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def write_toy_demonstration(folder: Path, task_id: str) -> None:
    """Write a demonstration of a toy task: a click, then the end."""
    create_folder(folder)
    actions = (Action(ActionKind.CLICK, x=56, y=56), Action(ActionKind.FINISHED))
    steps = [
        DemonstrationStep(action, Player.PERSON, write_screenshot(folder, index, screenshot(task_id, index)), 0.0)
        for index, action in enumerate(actions)
    ]
    demonstration = Demonstration(
        task_id=task_id,
        instruction=str(TASKS[task_id]["instruction"]),
        task={},
        seed=0,
        screen_size=(112, 112),
        source="test",
        deskrl_version="0",
        steps=tuple(steps),
        reward=1.0,
        termination="finished",
    )
    write_demonstration(folder, demonstration)


def test_a_loss_of_the_users_own_trains_and_its_metrics_are_logged_to_the_trackers(
    start_run: Callable[..., ToyRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "examples" / "loss"))
    grpo = {**GRPO, "num_updates": 1, "loss": "cispo_loss:cispo", "loss_options": {"clip_high": 0.5}}
    run = start_run(
        tracker=["wandb", "tensorboard"],
        grpo={**grpo, "zero_variance_groups": "keep"},  # an untrained policy has nothing else to train on
        reward_of=lambda rollout: float(rollout.seed % 2),
    )
    run.finish(run.start())
    (update,) = run.metrics("update")
    assert update["applied"] and update["loss_metrics"] == {"pi_weight": pytest.approx(1, abs=0.3)}
    (events,) = (run.folder.root / "tensorboard").iterdir()
    assert b"update/loss" in events.read_bytes()
    (log,) = (run.folder.root / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    for key in (b"update/loss", b"update/success_rate"):
        assert key in written, key


def check_results(run: ToyRun) -> None:
    """Check the keys of the result files."""
    (*_, last) = json.loads((run.folder.results / "training_metrics.json").read_text())
    assert last["epoch"] == 1
    assert {"average_reward", "success_rate", "replay_buffer_size", "replay_buffer_usage"} <= last.keys()
    assert {"policy_loss", "learning_rate", "gradient_norm"} <= last.keys()
    for task_id, task in TASKS.items():
        record = json.loads((run.folder.results / "task_results" / f"{task_id}.json").read_text())
        assert record["instruction"] == task["instruction"]
        assert record["eval"]["before"]["n"] == record["eval"]["after"]["n"] == 2
    stats = json.loads((run.folder.results / "replay_buffer_stats.json").read_text())
    assert all({"stored", "used", "newest_version"} <= entry.keys() for entry in stats.values())


def check_token_stats(run: ToyRun, update: dict[str, Any]) -> None:
    """Check that the statistics of single tokens agree with the record of the update."""
    groups = read_token_stats(run.folder, "train/000003")
    assert len(groups) == 2
    episodes = [episode for group in groups.values() for episode in group.values()]
    assert len(episodes) == update["num_trajectories"]
    entropies = [entropy for episode in episodes for entropy in episode.entropies]
    assert len(entropies) == update["num_tokens"]
    assert sum(entropies) / len(entropies) == pytest.approx(update["entropy"], rel=1e-5)
    sampled = {episode.episode_id: episode for episode in run.replay.client().episodes(queue="train")}
    largest = 0.0
    for group in groups.values():
        assert sum(episode.advantage for episode in group.values()) == pytest.approx(0, abs=1e-6)
        for name, episode in group.items():
            steps = [decode_step(data) for data in sampled[name].steps]
            logprobs = [logprob for step in steps for logprob in step.logprobs]
            fresh = all(span.step == 2 for step in steps for span in step.spans) and not episode.from_success_buffer
            differences = [abs(a - b) for a, b in zip(logprobs, episode.logprobs, strict=True)]
            largest = max(largest, *differences) if fresh else largest
    assert largest <= (update["mismatch_max"] or 0.0) + 1e-7


def check_checkpoints(run: ToyRun) -> None:
    """Check names and weights of the checkpoints; with four tasks and two groups per batch, an epoch is two updates."""
    names = sorted(path.name for path in run.folder.checkpoints.glob("epoch_*"))
    assert names == ["epoch_0_update_1", "epoch_1", "epoch_1_update_3"]
    newest = run.folder.checkpoints / "latest"
    assert newest.resolve().name == "epoch_1_update_3"
    served = run.replicas[0].policy
    assert served is not None
    saved = ToyPolicy(newest)
    assert saved.processor_hash == served.processor_hash
    for name, tensor in saved.model.state_dict().items():
        assert tensor.equal(served.model.state_dict()[name]), name
    check_model_card(run, newest)


def check_model_card(run: ToyRun, checkpoint: Path) -> None:
    """Check that the card of the newest checkpoint can be published with the folder, which names no other folder."""
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    for line in ("| policy updates | 3 |", "| success before training | ", "| success after training | "):
        assert line in card.text
    excluded = (checkpoint / ".gitignore").read_text().split()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in excluded:
            assert str(run.config.runs).encode() not in path.read_bytes(), path.name


TWO_RANKS = {"num_processes": 2, "zero_stage": 3}


@pytest.mark.parametrize(
    ("ranks", "kl_coefficient"), [({}, 0.0), (TWO_RANKS, 0.1)], ids=["one rank", "two, sharded, with a reference"]
)
def test_sigterm_ends_the_learner_with_a_status_of_its_own_and_the_next_start_resumes(
    start_run: Callable[..., ToyRun], ranks: dict[str, Any], kl_coefficient: float
) -> None:
    run = start_run(grpo={**GRPO, "kl_coefficient": kl_coefficient}, **ranks)
    learner = run.start()
    run.wait_for(lambda: len(run.metrics("update")) == 1, learner)
    learner.send_signal(signal.SIGTERM)
    run.finish(learner, STOPPED_STATUS)
    _forget_last_update(run.folder.metrics)
    run.finish(run.start())
    assert [update["update"] for update in run.metrics("update")] == [1, 2, 3]
    assert run.metrics("phase")[-1]["phase"] == "finished"
    served = [lineage for lineage, _ in run.replicas[0].versions]
    assert len(set(served)) == 2, "the resumed learner has a new lineage"
    assert [step for lineage, step in run.replicas[0].versions if lineage == served[-1]] == [1, 2, 3]
    trained = [update for update in run.metrics("update") if update["num_tokens"]]
    assert all((update["kl"] is not None) == (kl_coefficient > 0) for update in trained)
    assert run.folder.reference.exists() == (kl_coefficient > 0)


def _forget_last_update(metrics: Path) -> None:
    """Remove the last update from the metrics, as if the learner was killed between its checkpoint and its line."""
    lines = metrics.read_text().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if '"kind": "update"' in line)
    metrics.write_text("".join(lines[:last]))


def test_a_killed_learner_repeats_the_update_on_the_same_batch_with_the_same_loss(
    start_run: Callable[..., ToyRun],
) -> None:
    """A kill between an update and its checkpoint loses the update but not the batch."""
    run = start_run(grpo={**GRPO, "num_updates": 2}, checkpoint_every=2)
    run.finish(run.start(grpo={**run.config.learner.grpo.model_dump(), "num_updates": 1}))
    checkpoint = run.folder.checkpoints / "epoch_0_update_1"
    before = {path.name for path in run.folder.checkpoints.glob("epoch_*")}
    assert checkpoint.name in before
    first = run.start()
    run.wait_for(lambda: len(run.metrics("update")) == 2, first)
    first.kill()
    first.communicate()
    # Remove the second update's checkpoint, as if the kill came just before it was renamed.
    for path in run.folder.checkpoints.glob("epoch_*"):
        if path.name not in before:
            shutil.rmtree(path)
    run.stop_actor()
    run.finish(run.start())
    first_record, second_record = [update for update in run.metrics("update") if update["update"] == 2]
    for key in ("loss", "gradient_norm", "num_tokens", "success_rate", "importance_mean", "entropy", "dropped"):
        assert second_record[key] == first_record[key], key


def test_a_replica_with_wrong_weights_is_quarantined_and_catches_up(start_run: Callable[..., ToyRun]) -> None:
    run = start_run(num_replicas=2, grpo={**GRPO, "num_updates": 2})
    faulty = run.replicas[1]
    faulty.has_wrong_canary.set()
    learner = run.start()
    run.wait_for(lambda: any(not line["ok"] for line in run.metrics("weights")), learner)
    faulty.has_wrong_canary.clear()
    run.wait_for(lambda: any(line["late"] and line["ok"] for line in run.metrics("weights")), learner)
    log = run.finish(learner)
    assert "replica 1 is quarantined" in log
    assert "canary differs" in log
    assert all(line["ok"] for line in run.metrics("weights") if line["replica"] == 0)
    assert len(run.metrics("update")) == 2, "the run continues with the other replica"


def test_a_restarted_replica_gets_the_current_weights(
    start_run: Callable[..., ToyRun],
) -> None:
    run = start_run(num_replicas=2, grpo={**GRPO, "num_updates": 2})
    learner = run.start()
    restarted = run.replicas[1]
    run.wait_for(lambda: bool(restarted.versions), learner)
    restarted.restart()
    run.wait_for(lambda: any(line["late"] and line["ok"] for line in run.metrics("weights")), learner)
    log = run.finish(learner)
    assert "replica 1 has restarted" in log and "quarantined" not in log
    assert restarted.versions[-1] == run.replicas[0].versions[-1]


def test_replicas_join_and_leave_during_training(start_run: Callable[..., ToyRun]) -> None:
    run = start_run(grpo=GRPO)
    stays, leaves = (run.join() for _ in range(2))
    learner = run.start()

    def both_have_weights() -> bool:
        run.announce(stays)
        run.announce(leaves)
        return bool(stays.versions and leaves.versions)

    run.wait_for(both_have_weights, learner)
    run.announce(leaves, is_leaving=True)
    leaves.close()
    while learner.poll() is None:
        run.announce(stays)
        time.sleep(0.2)
    log = run.finish(learner)
    assert f"{leaves.address} has left" in log and "quarantined" not in log
    assert stays.versions[-1] == run.replicas[0].versions[-1], "it ends with the same weights as the others"
    assert len(run.metrics("update")) == GRPO["num_updates"]


def test_the_learner_waits_while_its_only_replica_is_unavailable(start_run: Callable[..., ToyRun]) -> None:
    run = start_run(grpo={**GRPO, "num_updates": 1})
    run.replicas[0].is_unavailable.set()
    learner = run.start()
    run.wait_for(lambda: any(not line["ok"] for line in run.metrics("weights")), learner)
    run.replicas[0].is_unavailable.clear()
    run.finish(learner)
    assert any(line["ok"] and line["late"] for line in run.metrics("weights"))
    assert len(run.metrics("update")) == 1


def test_the_learner_fails_if_all_replicas_reject_its_weights(start_run: Callable[..., ToyRun]) -> None:
    run = start_run(grpo=GRPO)
    run.replicas[0].rejects.set()
    learner = run.start()
    _, log = learner.communicate(timeout=_DEADLINE_S)
    assert learner.returncode != 0
    assert "no inference replica serves version 0" in log


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "learner.json").write_text("{"), "not a valid checkpoint"),
        (lambda folder: (folder / "learner.json").unlink(), "not a valid checkpoint"),
        (lambda folder: _truncate(folder / "model.safetensors"), "model.safetensors is missing or truncated"),
        (lambda folder: _scramble(next(folder.glob("engine/engine/*optim*"))), "engine state cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_rejected_with_a_message_of_one_line(
    finished: ToyRun, damage: Callable[[Path], object], message: str
) -> None:
    newest = (finished.folder.checkpoints / "latest").resolve()
    saved = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    damage(newest)
    learner = finished.start()
    _, log = learner.communicate(timeout=_DEADLINE_S)
    for path, data in saved.items():
        path.write_bytes(data)
    assert learner.returncode == 2, log[-2000:]
    (line,) = [line for line in log.splitlines() if message in line]
    assert "remove it to resume from the previous checkpoint" in line


def test_a_checkpoint_of_another_layout_is_rejected_with_the_key_that_differs(finished: ToyRun) -> None:
    learner = finished.start(zero_stage=2)
    _, log = learner.communicate(timeout=_DEADLINE_S)
    assert learner.returncode == 2, log[-2000:]
    assert "learner.zero_stage = 1, this run has 2" in log


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyRun]:
    """Finished run of one update."""
    run = ToyRun(tmp_path_factory.mktemp("finished"), grpo={**GRPO, "num_updates": 1})
    run.finish(run.start())
    yield run
    run.close()


def _truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def _scramble(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)
