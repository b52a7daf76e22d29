"""Built-in trackers against the real packages: what they write is read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deskrl.core.config import RunConfig
from deskrl.learner.metrics.run_trackers import RunTrackers
from deskrl.testing.trackers import TrackerSuite


@pytest.fixture
def wandb() -> None:
    pytest.importorskip("wandb", reason="wandb is an extra")


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")


@pytest.fixture
def mlflow() -> None:
    pytest.importorskip("mlflow", reason="mlflow is an extra")
    pytest.importorskip("alembic", reason="mlflow is an extra")


@pytest.mark.usefixtures("wandb")
class TestWandb(TrackerSuite):
    selection = "wandb"


@pytest.mark.usefixtures("tensorboard")
class TestTensorBoard(TrackerSuite):
    selection = "tensorboard"


@pytest.mark.usefixtures("mlflow")
class TestMlflow(TrackerSuite):
    selection = "mlflow"


def log_and_resume(config: RunConfig) -> None:
    """Log updates 1 and 2, and after a restart 2 and 3."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for updates in ((1, 2), (2, 3)):
        run = RunTrackers(config)
        for update in updates:
            run.log("update", {"update": update, "loss": 0.5 / update, "per_task": {"a: b": {"n": 4}}, "note": "text"})
        run.close()


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(runs=tmp_path, tracker=("tensorboard",))
    log_and_resume(config)
    events = EventAccumulator(str(config.run_dir / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"update/update", "update/loss", "update/per_task/a: b/n"}
    points = {scalar.step: scalar.value for scalar in events.Scalars("update/loss")}
    assert points == pytest.approx({1: 0.5, 2: 0.25, 3: 0.5 / 3})


@pytest.mark.usefixtures("mlflow")
def test_mlflow_reads_what_was_logged_as_one_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = RunConfig(runs=tmp_path, name="mine", tracker=("mlflow",))
    log_and_resume(config)
    client = MlflowClient(f"sqlite:///{config.run_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("deskrl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "update/loss")
    assert {point.step: point.value for point in history} == pytest.approx({1: 0.5, 2: 0.25, 3: 0.5 / 3})
    assert run.data.metrics["update/per_task/a_ b/n"] == 4


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: LevelDB's log format after a header of 7 bytes, for which wandb's package
    has no reader in Python."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is too short for a header of checksum (4), length (2) and kind (1)
            place += left
            continue
        num_bytes, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + num_bytes]
        place += 7 + num_bytes
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.usefixtures("wandb")
def test_wandb_keeps_what_was_logged_for_its_upload(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    config = RunConfig(runs=tmp_path, tracker=("wandb",), tracker_options={"wandb": {"project": "other"}})
    log_and_resume(config)
    projects, losses = set(), []
    for path in (config.run_dir / "wandb").glob("offline-run-*/*.wandb"):
        for record in map(Record.FromString, wandb_records(path)):
            if record.HasField("run"):
                projects.add(record.run.project)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "update/loss" in items:
                losses.append(float(items["update/loss"]))
    assert projects == {"other"}
    assert sorted(losses) == pytest.approx([0.5 / 3, 0.25, 0.25, 0.5])
