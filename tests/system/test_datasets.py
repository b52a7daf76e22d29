"""`deskrl data`: a run whose replay service is running is exported as Parquet and imported again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from replay_kit import ReplayClient, ReplayProcess, begin, fault, image, replay_config, result

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstrations import find_demonstrations, read_demonstration, read_screenshot
from deskrl.analysis.datasets.parquet_schema import COLUMNS
from deskrl.cli.main import main
from deskrl.core.ids import image_hash
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.learner.batches.token_stats import EpisodeTokenStats, write_token_stats
from deskrl.proto.v1 import rollout_pb2

CLICK = {"kind": "click", "x": 320, "y": 180}
TEXTS = ("Thought: Go.\nAction: click(320,180)", "Thought: Done.\nAction: finished()")


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 360), colour).save(buffer, "PNG")
    return buffer.getvalue()


SHOTS = picture("navy"), picture("teal")


def sampled(index: int, action: dict[str, Any]) -> Step:
    name = image_hash(SHOTS[index])
    return Step(
        index=index,
        screenshot=name,
        images=(name,),
        text=TEXTS[index],
        prompt_ids=(1, 2, 3),
        action_ids=(4, 5),
        logprobs=(-0.5, -2.25),
        spans=(VersionSpan("main", 6, 0, 1), VersionSpan("main", 7, 1, 2)),
        action=action,
        processor_hash="abc",
    )


STEPS = sampled(0, CLICK), sampled(1, {"kind": "finished"})


def run_episode(client: ReplayClient, reward: float) -> None:
    """Run the next planned rollout: a click, then the end."""
    requests = [
        rollout_pb2.StreamEpisodeRequest(
            step=rollout_pb2.EpisodeStep(index=step.index, image_hashes=[step.screenshot], payload=encode_step(step)),
            images=[image(SHOTS[step.index])],
        )
        for step in STEPS
    ]
    assert client.stream([begin(client.acquire()), *requests, result(reward, 2)])[-1] == (2, True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """A run with two training episodes, which have an advantage, one evaluation episode, and one fault."""
    process = ReplayProcess(replay_config(tmp_path_factory.mktemp("data"), max_faults=0))
    client = process.client()
    client.plan("train/0", task_id="fold")
    run_episode(client, 1.0)
    run_episode(client, 0.0)
    assert client.take("train", "train/000001", 0) is not None
    client.commit("train", "train/000001")
    stats = {f"train/0.{member}": EpisodeTokenStats(0.5 - member, False, (), ()) for member in range(2)}
    run_dir = RunDir(process.config.run_dir)
    write_token_stats(run_dir, "train/000001", {"train/0": stats}, keep=1)
    client.plan("eval/before/0", task_id="paint")
    client.stream([begin(client.acquire()), fault("the screen went black")])
    run_episode(client, 0.25)
    yield run_dir
    process.close()


@pytest.fixture(scope="module")
def dataset(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported run."""
    out = tmp_path_factory.mktemp("export") / "dataset"
    assert main(["data", "export", str(run.root), str(out)]) == 0
    return out


def rows(dataset: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((dataset / "data").glob("*.parquet"), reverse=True)]
    found: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return found


def test_each_step_is_a_row_with_all_that_was_recorded(dataset: Path) -> None:
    found = rows(dataset)
    assert [(row["episode_id"], row["step"]) for row in found] == [
        *(("train/0.0", step) for step in range(2)),
        *(("train/0.1", step) for step in range(2)),
        *(("eval/before/0.1", step) for step in range(2)),
    ]
    first = found[0]
    assert list(first) == list(COLUMNS)
    assert first.pop("ended_unix_s") > 0
    assert json.loads(first.pop("action")) == CLICK
    assert first == {
        "episode_id": "train/0.0",
        "group_id": "train/0",
        "member": 0,
        "task_id": "fold",
        "queue": "train",
        "split": "train",
        "seed": 0,
        "instruction": "",
        "step": 0,
        "num_steps": 2,
        "screenshot": {"bytes": SHOTS[0], "path": f"{STEPS[0].screenshot}.png"},
        "screen_width": 640,
        "screen_height": 360,
        "text": TEXTS[0],
        "reward": 1.0,
        "advantage": 0.5,
        "termination": "finished",
        "acting_policy": "sampled",
        "temperature": 1.0,
        "prompt_ids": [1, 2, 3],
        "action_ids": [4, 5],
        "logprobs": [-0.5, -2.25],
        "policy_versions": [
            {"lineage": "main", "step": 6, "start": 0, "end": 1},
            {"lineage": "main", "step": 7, "start": 1, "end": 2},
        ],
        "processor_hash": "abc",
    }


def test_queues_become_splits_which_the_card_names(dataset: Path) -> None:
    assert sorted(path.name for path in (dataset / "data").iterdir()) == [
        "eval-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    card = (dataset / "README.md").read_text()
    assert "  - split: eval\n    path: data/eval-*" in card
    assert "| train | 2 | 4 |" in card
    assert [(row["queue"], row["advantage"]) for row in rows(dataset)[-2:]] == [("eval/before", None)] * 2


def test_an_episode_that_ended_with_a_fault_is_left_out_and_named(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "export", str(run.root), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "it ended with a fault, so it has no reward" in shown
    assert "eval/before/0.0" in shown
    assert "3 episodes with 6 steps" in shown
    assert "1 episode left out" in shown


def test_episodes_are_selected_by_queue_task_and_reward(run: RunDir, tmp_path: Path) -> None:
    selections = {
        ("--queue", "train"): {"train/0.0", "train/0.1"},
        ("--task", "paint"): {"eval/before/0.1"},
        ("--min-reward", "0.2"): {"train/0.0", "eval/before/0.1"},
    }
    for number, (options, expected) in enumerate(selections.items()):
        out = tmp_path / str(number)
        assert main(["data", "export", str(run.root), str(out), *options]) == 0
        assert {row["episode_id"] for row in rows(out)} == expected


def test_nothing_to_export_is_an_error_that_leaves_no_files(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "export", str(run.root), str(tmp_path / "out"), "--task", "fly"]) == 2
    assert "no episode to export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_exported_run_is_imported_as_demonstrations(dataset: Path, tmp_path: Path) -> None:
    assert main(["data", "import", str(dataset), str(tmp_path / "out")]) == 0
    folders = find_demonstrations(tmp_path / "out")
    found = [read_demonstration(folder) for folder in folders]
    assert sorted((one.task_id, one.reward) for one in found) == [("fold", 0.0), ("fold", 1.0), ("paint", 0.25)]
    for folder, one in zip(folders, found, strict=True):
        assert [step.action for step in one.steps] == [
            Action(ActionKind.CLICK, x=320, y=180),
            Action(ActionKind.FINISHED),
        ]
        assert [step.thought for step in one.steps] == ["Go.", "Done."]
        assert tuple(read_screenshot(folder, one, step.screenshot) for step in one.steps) == SHOTS
