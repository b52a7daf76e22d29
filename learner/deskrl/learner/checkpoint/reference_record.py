"""Record of the reference policy of a run, so that a resumed run measures the KL divergence from the same policy."""

from __future__ import annotations

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object, write_json
from deskrl.core.run_dir import RunDir
from deskrl.models.model_checks import fingerprint_weights

KEY = "learner.grpo.kl_coefficient"
"""Configuration key that makes a run have a reference policy."""
_FINGERPRINT = "weights"


def check_reference(config: RunConfig) -> None:
    """Check that the reference policy of a run, if it has one, is the one that it started with. Changes nothing.

    Raises:
        UserError: its weights are others than those recorded, or the record cannot be read.
    """
    record = RunDir(config.run_dir).reference
    if not config.learner.grpo.kl_coefficient or not record.exists():
        return
    recorded = read_json_object(record, f"restore it, or set {KEY} to 0").get(_FINGERPRINT)
    found = fingerprint_weights(config.model_folder)
    if found != recorded:
        raise UserError(
            f"{KEY}: the weights in {config.model_folder} are not those of the reference policy that this run started "
            f"with (fingerprint {found} instead of {recorded})",
            "restore the model, or start a new run under another name",
        )


def record_reference(config: RunConfig) -> None:
    """Check the reference policy of a run, and record it if it is the run's first.

    Raises:
        UserError: see `check_reference`.
    """
    check_reference(config)
    record = RunDir(config.run_dir).reference
    if not record.exists():
        write_json(record, {_FINGERPRINT: fingerprint_weights(config.model_folder)})
