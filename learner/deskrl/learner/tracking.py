"""The run's metrics in wandb too, where a run asks for it. metrics.jsonl has them in any case. Knows wandb alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError, missing_package


class Tracker:
    """One wandb run for one deskrl run, a resumed one included.

    Args:
        config: of the run; `wandb` says whether and how.

    Raises:
        UserError: wandb is asked for and not installed, or lets nobody in.
    """

    def __init__(self, config: RunConfig) -> None:
        self._run: Any = None
        if config.wandb == "off":
            return
        try:
            import wandb
        except ImportError as error:
            raise missing_package("wandb", "wandb") from error
        try:
            self._run = wandb.init(
                project="deskrl",
                name=config.name,
                mode=config.wandb,
                dir=config.folder,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
        except wandb.Error as error:
            raise UserError(f"wandb does not start: {error}", "mend that, or choose --wandb offline") from error

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """One line of metrics; its numbers become `kind/key/...`."""
        if self._run is not None:
            self._run.log(dict(_numbers(kind, values)))

    def close(self) -> None:
        """Write out what is pending, and end wandb's process."""
        if self._run is not None:
            self._run.finish()


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", float(value)
