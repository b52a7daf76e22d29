"""Checks that weights are not quantised: those of a trained model, of its replicas, and of a model that is merged."""

from __future__ import annotations

from pathlib import Path

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.models.model_checks.completeness import HINT


def check_not_quantized(config: RunConfig) -> None:
    """Raise UserError if a training run uses quantised weights, whose updates could be neither loaded nor verified."""
    check_model_not_quantized(config)
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


def check_model_not_quantized(config: RunConfig) -> None:
    """Raise UserError if the model of a training run has quantised weights."""
    folder = config.model.path
    if folder is not None and (folder / "config.json").is_file() and (method := quantization_method(folder)):
        reason = ", not even by learner.lora: replicas would serve other weights than the learner trains with"
        raise UserError(
            f"{folder}: weights quantised by {method} cannot be trained{reason if config.learner.has_lora else ''}",
            "set model.path to the original model",
        )


def quantization_method(folder: Path) -> str | None:
    """Return the method by which the weights of a model directory are quantised; None if they are not."""
    quantization = read_json_object(folder / "config.json", HINT).get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "an unknown method")
