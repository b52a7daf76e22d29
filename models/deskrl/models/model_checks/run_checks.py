"""Check that the model of a training run is not quantised."""

from __future__ import annotations

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.models.model_checks.completeness import HINT


def check_not_quantized(config: RunConfig) -> None:
    """Raise UserError if a training run uses quantised weights, whose updates could be neither loaded nor verified."""
    folder = config.model.path
    if folder is not None and (folder / "config.json").is_file():
        kept = read_json_object(folder / "config.json", HINT).get("quantization_config")
    else:
        kept = None
    if kept is not None:
        method = kept.get("quant_method", "an unknown method") if isinstance(kept, dict) else "an unknown method"
        reason = ", not even by learner.lora: replicas would serve other weights than the learner trains with"
        raise UserError(
            f"{folder}: weights quantised by {method} cannot be trained{reason if config.learner.has_lora else ''}",
            "set model.path to the original model",
        )
    asked = {
        "inference.quantization": config.inference.quantization,
        "inference.engine_args.quantization": config.inference.engine_args.get("quantization"),
    }
    for key, value in asked.items():
        if value is not None:
            raise UserError(
                f"{key} = {value}: quantised replicas cannot load updates in a training run",
                f"unset {key}; `deskrl eval` supports it",
            )
