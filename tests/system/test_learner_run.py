"""The learner as a process of its own, with a real replay service and one who plays: runs, ends and resumptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from learner_kit import TASKS, ToyPolicy, build_model
from learner_player import ToyPlayer, ToyReplica
from ports_kit import free_port
from replay_kit import ReplayProcess

from deskrl.core import rpc
from deskrl.core.cli import main
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.presets import PRESETS
from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import read_scores
from deskrl.core.trajectory import decode_step
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc

_DEADLINE_S = 240.0


class World:
    """One run: replay, player, replica, and a learner that comes and goes."""

    def __init__(self, root: Path, num_replicas: int = 1, wandb: str = "off", **learner: Any) -> None:
        port = free_port()
        self.config = RunConfig.model_validate(
            {
                "runs": root,
                "name": "toy",
                "wandb": wandb,
                "tasks": {"rollouts": 4, "max_steps": 3},
                "agent": {"image_width": 112, "image_height": 112},
                "replay": {"address": f"127.0.0.1:{free_port()}"},
                "inference": {"address": f"127.0.0.1:{port}", "dtype": "float32", "num_replicas": num_replicas},
                "learner": {"dtype": "float32", **learner},
            }
        )
        self.folder = RunFolder(self.config.folder)
        self.replay = ReplayProcess(self.config)
        build_model(self.config.model_folder)
        # As if the run began from the checkpoint of another one: nothing of that learner's record is this one's.
        (self.config.model_folder / "learner.json").write_text('{"schema": 1, "num_updates": 7, "state": {}}')
        (self.folder.root / "tasks.json").write_text(json.dumps(TASKS))
        self.replicas = [
            ToyReplica(f"127.0.0.1:{port + index}", self.config.model_folder, root) for index in range(num_replicas)
        ]
        self.player: ToyPlayer | None = ToyPlayer(self.replay.client(), self.replicas[0])
        self._config_path = self.folder.config
        self._learners: list[subprocess.Popen[str]] = []

    def start(self, **learner: Any) -> subprocess.Popen[str]:
        """Start the learner; keywords override keys of its section."""
        merged = self.config.model_dump(mode="json")
        merged["learner"] |= learner
        dump_config(RunConfig.model_validate(merged), self._config_path)
        command = [sys.executable, "-m", "deskrl.core.cli", "learner", str(self._config_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._learners.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return self._learners[-1]

    def finish(self, learner: subprocess.Popen[str]) -> str:
        """Wait for the learner's own end; its log."""
        _, log = learner.communicate(timeout=_DEADLINE_S)
        assert learner.returncode == 0, log[-3000:]
        return log

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        return list(self.folder.read_metrics(kind))

    def wait_for(self, condition: Callable[[], bool], learner: subprocess.Popen[str]) -> None:
        """Until something has come to be; a learner that ended without it fails the test."""
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            assert learner.poll() is None, learner.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "it did not come to be"
            time.sleep(0.02)

    def join(self) -> ToyReplica:
        """A replica that the configuration does not name."""
        self.replicas.append(ToyReplica(f"127.0.0.1:{free_port()}", self.config.model_folder, self.config.runs))
        return self.replicas[-1]

    def announce(self, replica: ToyReplica, is_leaving: bool = False) -> None:
        """What a replica that joined says again and again."""
        request = directory_pb2.AnnounceRequest(
            peer=rpc.peer("inference", "toy"), address=replica.address, is_leaving=is_leaving
        )
        with rpc.connect_sync(self.config.replay.address) as channel:
            directory_pb2_grpc.DirectoryServiceStub(channel).Announce(request, timeout=20)

    def stop_playing(self) -> None:
        if self.player is not None:
            self.player.close()
            self.player = None

    def close(self) -> None:
        for learner in self._learners:
            if learner.poll() is None:
                learner.kill()
                learner.communicate()
        self.stop_playing()
        for replica in self.replicas:
            replica.close()
        self.replay.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**settings: Any) -> World:
        worlds.append(World(tmp_path / str(len(worlds)), **settings))
        return worlds[-1]

    yield make
    for each in worlds:
        each.close()


BUDGET = 17
GRPO = {"num_updates": 3, "groups_per_batch": 2, "learning_rate": 1e-3, "max_staleness": 1}
WARM_START = {"demos_per_task": 2, "stop_likelihood": 0.2, "max_updates": 60}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A run from demonstrations to results, over."""
    run = World(tmp_path_factory.mktemp("learnt"), grpo=GRPO, warm_start=WARM_START, eval={"episodes": 8})
    run.finish(run.start())
    yield run
    run.close()


def test_a_run_from_demonstrations_to_results(learnt: World) -> None:
    run = learnt
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
        assert evaluation["num_other_version"] == 0, "an evaluation is of one version"
        assert evaluation["mismatch_max"] < 1e-4
    assert evaluations["before"]["version"] == 0
    assert evaluations["after"]["version"] == 3
    weights = run.metrics("weights")
    assert [line["version"] for line in weights] == [0, 1, 2, 3]
    assert all(line["ok"] and line["canary_max_difference"] < 1e-4 for line in weights)
    check_results(run)
    check_checkpoints(run)
    check_scores(run, updates[-1])


def test_a_run_learns_again_what_it_has_learnt_bit_for_bit(
    learnt: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints after updates 1, 2 and 3 are kept, so 2 and 3 can be; a record that was tampered with is found."""
    run = learnt
    run.stop_playing()
    run.replay.stop()
    entropy = run.metrics("update")[-1]["entropy"]
    recorded = run.folder.metrics.read_text().replace(repr(entropy), repr(entropy + 1e-9))
    run.folder.metrics.write_text(recorded)
    before = {path: path.stat().st_mtime_ns for path in run.folder.checkpoints.rglob("*")}
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the learner had: other sums of floats come of other threads
    assert main(["replay-run", str(run.folder.root)]) == 1
    told = capsys.readouterr().out
    assert re.search(r"│ 2 +│ epoch_0_update_1 .* bit for bit │ +│\n", told), told
    assert re.search(r"│ 3 +│ epoch_0_update_1 .* no ", told), told
    assert f"entropy {entropy + 1e-9!r}, {entropy!r}" in told
    assert "gradient_norm" not in told, "only what differs is named"
    assert "not learnt again: update 1: no checkpoint before it is kept (learner.keep_checkpoints)" in told
    assert {path: path.stat().st_mtime_ns for path in run.folder.checkpoints.rglob("*")} == before


def test_arpos_preset_keeps_every_group_and_learns_in_lock_step(world: Callable[..., World]) -> None:
    arpo = PRESETS["arpo"]["learner"]["grpo"]
    ends = {"num_updates": 50, "env_steps": BUDGET}
    run = world(grpo={**arpo, **ends, "groups_per_batch": 2, "learning_rate": 1e-3, "warmup_updates": 1})
    run.finish(run.start())
    updates = run.metrics("update")
    steps = [update["num_env_steps"] for update in updates]
    assert sum(steps[:-1]) < BUDGET <= sum(steps), "the update that uses the environment steps up is the last"
    assert all((update["num_trajectories"], update["dropped"]) == (8, {}) for update in updates)
    assert all(update["staleness_max"] == 0 for update in updates)
    assert [update["learning_rate"] for update in updates] == [0.0, *[1e-3] * (len(updates) - 1)]
    assert all(update["applied"] for update in updates)
    assert all(0 <= update["without_spread"] <= 2 for update in updates)


def test_wandb_gets_the_metrics_too(world: Callable[..., World]) -> None:
    run = world(wandb="offline", grpo={**GRPO, "num_updates": 1})
    run.finish(run.start())
    (log,) = (run.folder.root / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    for key in (b"update/loss", b"update/success_rate"):
        assert key in written, key


def check_results(run: World) -> None:
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


def check_scores(run: World, update: dict[str, Any]) -> None:
    """What is kept of each token adds up to what the update says of all."""
    groups = read_scores(run.folder, "train/000003")
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
            fresh = all(span.step == 2 for step in steps for span in step.spans) and not episode.replayed
            differences = [abs(a - b) for a, b in zip(logprobs, episode.logprobs, strict=True)]
            largest = max(largest, *differences) if fresh else largest
    assert largest <= (update["mismatch_max"] or 0.0) + 1e-7


def check_checkpoints(run: World) -> None:
    """Four tasks in batches of two groups: an epoch is two updates."""
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


@pytest.mark.parametrize("ranks", [{}, {"num_processes": 2, "zero_stage": 3}], ids=["one rank", "two, sharded"])
def test_sigterm_ends_it_with_status_0_and_the_next_start_goes_on(
    world: Callable[..., World], ranks: dict[str, Any]
) -> None:
    run = world(grpo=GRPO, **ranks)
    learner = run.start()
    run.wait_for(lambda: len(run.metrics("update")) == 1, learner)
    learner.send_signal(signal.SIGTERM)
    run.finish(learner)
    _forget_last_update(run.folder.metrics)
    run.finish(run.start())
    assert [update["update"] for update in run.metrics("update")] == [1, 2, 3]
    assert run.metrics("phase")[-1]["phase"] == "finished"
    served = [lineage for lineage, _ in run.replicas[0].versions]
    assert len(set(served)) == 2, "the restored learner goes on under a lineage of its own"
    assert [step for lineage, step in run.replicas[0].versions if lineage == served[-1]] == [1, 2, 3]


def _forget_last_update(metrics: Path) -> None:
    """As a kill between an update's checkpoint and its line leaves it."""
    lines = metrics.read_text().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if '"kind": "update"' in line)
    metrics.write_text("".join(lines[:last]))


def test_a_killed_learner_takes_the_same_batch_again_and_the_loss_is_bit_equal(world: Callable[..., World]) -> None:
    """Killed between the update and its checkpoint: what was learnt is lost, what was taken is not."""
    run = world(grpo={**GRPO, "num_updates": 2}, checkpoint_every=2)
    run.finish(run.start(grpo={**run.config.learner.grpo.model_dump(), "num_updates": 1}))
    checkpoint = run.folder.checkpoints / "epoch_0_update_1"
    before = {path.name for path in run.folder.checkpoints.glob("epoch_*")}
    assert checkpoint.name in before
    first = run.start()
    run.wait_for(lambda: len(run.metrics("update")) == 2, first)
    first.kill()
    first.communicate()
    # As it was before the second update's checkpoint: this is what a kill just before the rename leaves.
    for path in run.folder.checkpoints.glob("epoch_*"):
        if path.name not in before:
            shutil.rmtree(path)
    run.stop_playing()
    run.finish(run.start())
    once, again = [update for update in run.metrics("update") if update["update"] == 2]
    for key in ("loss", "gradient_norm", "num_tokens", "success_rate", "importance_mean", "entropy", "dropped"):
        assert again[key] == once[key], key


def test_a_replica_that_fails_is_quarantined_and_catches_up(world: Callable[..., World]) -> None:
    run = world(num_replicas=2, grpo={**GRPO, "num_updates": 2})
    lame = run.replicas[1]
    lame.lie.set()
    learner = run.start()
    run.wait_for(lambda: any(not line["ok"] for line in run.metrics("weights")), learner)
    lame.lie.clear()
    run.wait_for(lambda: any(line["late"] and line["ok"] for line in run.metrics("weights")), learner)
    log = run.finish(learner)
    assert "replica 1 is quarantined" in log
    assert "canary differs" in log
    assert all(line["ok"] for line in run.metrics("weights") if line["replica"] == 0)
    assert len(run.metrics("update")) == 2, "the run goes on with the other"


def test_a_replica_that_was_started_again_is_brought_the_weights_that_the_others_have(
    world: Callable[..., World],
) -> None:
    run = world(num_replicas=2, grpo={**GRPO, "num_updates": 2})
    learner = run.start()
    again = run.replicas[1]
    run.wait_for(lambda: bool(again.versions), learner)
    again.start_again()
    run.wait_for(lambda: any(line["late"] and line["ok"] for line in run.metrics("weights")), learner)
    log = run.finish(learner)
    assert "replica 1 was started again" in log and "quarantined" not in log
    assert again.versions[-1] == run.replicas[0].versions[-1]


def test_replicas_join_and_leave_while_it_learns(world: Callable[..., World]) -> None:
    run = world(grpo=GRPO)
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
    assert stays.versions[-1] == run.replicas[0].versions[-1], "it ends with what the others have"
    assert len(run.metrics("update")) == GRPO["num_updates"]


def test_the_only_replica_may_be_away_for_a_while(world: Callable[..., World]) -> None:
    run = world(grpo={**GRPO, "num_updates": 1})
    run.replicas[0].away.set()
    learner = run.start()
    run.wait_for(lambda: any(not line["ok"] for line in run.metrics("weights")), learner)
    run.replicas[0].away.clear()
    run.finish(learner)
    assert any(line["ok"] and line["late"] for line in run.metrics("weights"))
    assert len(run.metrics("update")) == 1


def test_replicas_that_all_refuse_are_an_end_and_not_a_silence(world: Callable[..., World]) -> None:
    run = world(grpo=GRPO)
    run.replicas[0].refuse.set()
    learner = run.start()
    _, log = learner.communicate(timeout=_DEADLINE_S)
    assert learner.returncode != 0
    assert "no inference replica took version 0" in log


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "learner.json").write_text("{"), "no checkpoint of a learner"),
        (lambda folder: (folder / "learner.json").unlink(), "no checkpoint of a learner"),
        (lambda folder: _truncate(folder / "model.safetensors"), "model.safetensors is missing or cut short"),
        (lambda folder: _scramble(next(folder.glob("engine/engine/*optim*"))), "engine state cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_line(
    finished: World, damage: Callable[[Path], object], words: str
) -> None:
    newest = (finished.folder.checkpoints / "latest").resolve()
    saved = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    damage(newest)
    learner = finished.start()
    _, log = learner.communicate(timeout=_DEADLINE_S)
    for path, data in saved.items():
        path.write_bytes(data)
    assert learner.returncode == 2, log[-2000:]
    (line,) = [line for line in log.splitlines() if words in line]
    assert "remove it to go on from the checkpoint before it" in line


def test_a_checkpoint_of_another_layout_is_refused_by_name(finished: World) -> None:
    learner = finished.start(zero_stage=2)
    _, log = learner.communicate(timeout=_DEADLINE_S)
    assert learner.returncode == 2, log[-2000:]
    assert "learner.zero_stage = 1, this run has 2" in log


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A run of one update, over."""
    run = World(tmp_path_factory.mktemp("finished"), grpo={**GRPO, "num_updates": 1})
    run.finish(run.start())
    yield run
    run.close()


def _truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def _scramble(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)
