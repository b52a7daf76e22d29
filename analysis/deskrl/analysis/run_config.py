"""Configuration of a run whose run directory may have been moved."""

from __future__ import annotations

from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.run_dir import RunDir


def read_run_config(run_dir: RunDir) -> RunConfig:
    """Read the configuration that a run was started with; location and name are those of the run directory today.

    Raises:
        UserError: the directory contains no run, or its configuration is damaged.
    """
    return read_resolved(run_dir.config).model_copy(update={"runs": run_dir.root.parent, "name": run_dir.root.name})
