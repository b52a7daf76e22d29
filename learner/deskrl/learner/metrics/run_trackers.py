"""All experiment trackers of a run behind one object, and their selection."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError, missing_package
from deskrl.core.registry import Extension
from deskrl.learner.metrics.trackers import PACKAGES, TRACKERS, Tracker, TrackerClass

_MAX_REASON_CHARACTERS = 300

_log = logging.getLogger(__name__)


def select_trackers(config: RunConfig) -> list[Extension[TrackerClass]]:
    """Return the configured trackers with their options.

    Raises:
        UserError: a tracker cannot be selected, its package is not installed, or there are options for a tracker that
            does not exist.
    """
    for name in config.tracker_options:
        # Those of a tracker that exists and is not selected have no effect: it may be deselected on the command line.
        if name not in config.tracker and name not in TRACKERS.names():
            known = ", ".join(sorted({*TRACKERS.names(), *config.tracker}))
            raise UserError(f"tracker_options.{name}: there is no such tracker", f"choose one of {known}")
    for name in config.tracker:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise missing_package(PACKAGES[name], name)
    return [
        TRACKERS.select(name, config.tracker_options.get(name), options_key=f"tracker_options.{name}")
        for name in config.tracker
    ]


class RunTrackers:
    """All trackers of one run. An error of a tracker is logged once and does not end training.

    Args:
        config: run configuration.

    Raises:
        UserError: a tracker cannot be selected or started.
    """

    def __init__(self, config: RunConfig) -> None:
        self._step = 0
        self._trackers = {selected.name: _start(selected, config) for selected in select_trackers(config)}
        self._failed: set[str] = set()

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Log one line of metrics.jsonl; its numbers are named `kind/key/...`."""
        metrics = dict(_numbers(kind, values))
        self._step = int(metrics.get(f"{kind}/update", metrics.get(f"{kind}/version", self._step)))
        for name, tracker in self._trackers.items() if metrics else ():
            try:
                tracker.log(self._step, metrics)
            except Exception as error:
                self._warn(name, "log metrics", error)

    def close(self) -> None:
        """Flush and close all trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self._warn(name, "be closed", error)

    def _warn(self, name: str, action: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            reason = typed_line(error, _MAX_REASON_CHARACTERS)
            _log.warning("tracker %s could not %s and may lack some; training goes on: %s", name, action, reason)


def _start(selected: Extension[TrackerClass], config: RunConfig) -> Tracker:
    try:
        return selected.implementation(config, selected.options)
    except UserError:
        raise
    except Exception as error:
        reason = typed_line(error, _MAX_REASON_CHARACTERS)
        raise UserError(
            f"tracker: {selected.name} cannot be started: {reason}", f"correct tracker_options.{selected.name}"
        ) from error


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", float(value)
