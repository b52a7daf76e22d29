"""Tracker that posts each line of metrics as JSON to a URL, such as one of your own dashboard.

Use it with `tracker = ["http_tracker:HttpTracker"]`, its URL in `tracker_options."http_tracker:HttpTracker".url`, and
this folder on PYTHONPATH.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping

from pydantic import Field

from deskrl.core.config import RunConfig, Section


class HttpTracker:
    """Posts `{"run": name, "step": update, "metrics": {name: value}}`; numbers that are not finite become null.

    Args:
        config: run configuration.
        options: options of the tracker.
    """

    class Options(Section):
        """Options of the tracker."""

        url: str = Field(pattern=r"^https?://")
        """Address that accepts POST requests."""
        timeout_s: float = Field(default=5.0, gt=0)
        """Timeout of a request; training waits for it."""

    def __init__(self, config: RunConfig, options: Options) -> None:
        self._name = config.name
        self._options = options

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Post numbers; an error of the server is logged once by deskrl, and training goes on."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        body = json.dumps({"run": self._name, "step": step, "metrics": finite}).encode()
        request = urllib.request.Request(self._options.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self._options.timeout_s):
            pass

    def close(self) -> None:
        """Do nothing: each request is complete."""
