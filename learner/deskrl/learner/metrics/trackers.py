"""Experiment trackers: the interface, the registry, and those for wandb, TensorBoard and MLflow."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from deskrl.core.config import RunConfig, Section
from deskrl.core.errors import UserError, missing_package
from deskrl.core.registry import Registry, missing_arguments, missing_methods

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Package that each built-in tracker requires; the extra of deskrl that installs it has the tracker's name."""
_MLFLOW_BATCH = 1000
"""Maximum number of metrics in one request to MLflow."""
_FORBIDDEN_BY_MLFLOW = re.compile(r"[^\w\-./ ]")


class Tracker(Protocol):
    """Logs the numbers of one run to an experiment tracker, on rank 0 and from one thread.

    It writes below `config.run_dir` unless its options say otherwise, and continues what an earlier process of the run
    has written.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers.

        Args:
            step: number of the update that they belong to; a resumed run repeats some numbers.
            metrics: values by name, such as `update/loss`; names may contain any characters, values may be NaN.
        """

    def close(self) -> None:
        """Flush what was logged; called once, at the end of the run."""


TrackerClass = Callable[[RunConfig, Any], Tracker]
"""A tracker's class, which is called with the run configuration and an instance of its own `Options` or None."""


def _find_problem(found: Any) -> str | None:
    if not inspect.isclass(found):
        return "it is not a class"
    return missing_methods(found, "log", "close") or missing_arguments(found, "config", "options")


TRACKERS: Registry[TrackerClass] = Registry("tracker", "tracker", "deskrl.trackers", _find_problem)


@TRACKERS.register("wandb")
class WandbTracker:
    """Logs to one run of Weights & Biases.

    Args:
        config: run configuration.
        options: options of the tracker.

    Raises:
        UserError: wandb is not installed or cannot be started.
    """

    class Options(Section):
        """Options of the tracker."""

        mode: Literal["offline", "online"] = "offline"
        """`offline`: files in the run directory, which `wandb sync` uploads; `online`: to the server."""
        project: str = "deskrl"
        """Name of the project."""

    def __init__(self, config: RunConfig, options: Options) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_package("wandb", "wandb") from error
        try:
            self._run = wandb.init(
                project=options.project,
                name=config.name,
                mode=options.mode,
                dir=config.run_dir,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
        except wandb.Error as error:
            hint = "log in to wandb, or set tracker_options.wandb.mode to offline"
            raise UserError(f"tracker: wandb cannot be started: {error}", hint) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers; wandb counts its own steps, because it rejects those that a resumed run repeats."""
        self._run.log(dict(metrics))

    def close(self) -> None:
        """Flush pending metrics and end wandb's process."""
        self._run.finish()


@TRACKERS.register("tensorboard")
class TensorBoardTracker:
    """Writes event files to `tensorboard/` in the run directory.

    Args:
        config: run configuration.
        options: none.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, config: RunConfig, options: None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_package("tensorboard", "tensorboard") from error
        self._writer: Any = SummaryWriter(str(config.run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


@TRACKERS.register("mlflow")
class MlflowTracker:
    """Logs to one run of MLflow; a resumed run continues it.

    Args:
        config: run configuration.
        options: options of the tracker.

    Raises:
        UserError: MLflow is not installed.
    """

    class Options(Section):
        """Options of the tracker."""

        tracking_uri: str | None = None
        """Address of a tracking server or store; unset: the database `mlflow.db` in the run directory."""
        experiment: str = "deskrl"
        """Name of the experiment."""

    def __init__(self, config: RunConfig, options: Options) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise missing_package("mlflow", "mlflow") from error
        self._metric = Metric
        self._client = MlflowClient(options.tracking_uri or f"sqlite:///{config.run_dir / 'mlflow.db'}")
        found = self._client.get_experiment_by_name(options.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(options.experiment)
        tags = {"mlflow.runName": config.name, "deskrl.run_dir": str(config.run_dir)}
        own = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        earlier = self._client.search_runs([experiment], own, max_results=1)
        self._run_id = (earlier[0] if earlier else self._client.create_run(experiment, tags=tags)).info.run_id
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers; characters that MLflow does not permit in names are replaced by `_`."""
        now_ms = int(time.time() * 1e3)
        named = [(_FORBIDDEN_BY_MLFLOW.sub("_", name), value) for name, value in metrics.items()]
        for start in range(0, len(named), _MLFLOW_BATCH):
            batch = named[start : start + _MLFLOW_BATCH]
            self._client.log_batch(self._run_id, [self._metric(name, value, now_ms, step) for name, value in batch])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)
