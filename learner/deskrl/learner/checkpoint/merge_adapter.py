"""Merges a LoRA adapter into its model and writes the result as a model folder."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.learner.checkpoint.checkpoint_files import base_fingerprint, copy_model_files
from deskrl.learner.policy.lora import CONFIG, WEIGHTS
from deskrl.models.model_checks import check_complete, fingerprint_weights, quantization_method

_HINT = "give the folder of a checkpoint that was written with learner.lora.rank above 0"
_UNFIT_HINT = "give the adapter's own model with --base, or copy the adapter again from its source"


def merge_adapter(adapter: Path, output: Path, base: Path | None = None, architecture: str | None = None) -> None:
    """Write the model that replicas served at a checkpoint; the folder appears when it is complete.

    Args:
        adapter: folder of the adapter: a checkpoint, or one that peft wrote.
        output: folder of the merged model, which must not exist.
        base: folder of the model that the adapter belongs to; None: the one that `adapter_config.json` names.
        architecture: architecture of the model; None: it is found by `model_type`.

    Raises:
        UserError: the adapter or its model is missing, damaged, or they do not belong together.
    """
    if output.exists():
        raise UserError(f"{output}: exists already", "choose another folder for the merged model")
    for name in (WEIGHTS, CONFIG):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: contains no adapter ({name} is missing)", _HINT)
    base = base or _base_of(adapter)
    check_complete(base, architecture)
    if method := quantization_method(base):
        raise UserError(
            f"{base}: an adapter cannot be merged into weights quantised by {method}",
            "give the original model with --base",
        )
    expected = base_fingerprint(adapter)
    if expected is not None and expected != fingerprint_weights(base):
        raise UserError(f"{adapter}: the adapter belongs to another model than {base}", "give its model with --base")
    merged = _merged_model(adapter, base)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    merged.save_pretrained(partial)
    copy_model_files(base, partial)  # replaces the config.json of transformers too
    os.rename(partial, output)


def _base_of(adapter: Path) -> Path:
    """Return the folder of an adapter's model."""
    named = read_json_object(adapter / CONFIG, _HINT).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise UserError(f"{adapter / CONFIG}: its model {named} is not on this machine", "give its folder with --base")
    return Path(named)


def _merged_model(adapter: Path, base: Path) -> Any:
    """Load a model with an adapter and merge them as the learner does, in the numeric type of the model."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForImageTextToText

    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            stored = set(file.keys())
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # this is an error below
            # Without the cast to float32, which the learner does not do before merging.
            wrapped = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{adapter}: does not fit the model {base} ({one_line(error, 300)})", _UNFIT_HINT) from error
    live = {name.replace(".default.", ".") for name, _ in wrapped.named_parameters() if ".lora_" in name}
    if stored != live:
        name = min(stored ^ live)
        raise UserError(f"{adapter}: does not fit the model {base}: {name} has no counterpart", _UNFIT_HINT)
    return wrapped.merge_and_unload()
