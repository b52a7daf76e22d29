"""Check that a model directory is complete: its files are there, undamaged, and fit together."""

from __future__ import annotations

from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.prompt_rendering import read_image_sizing
from deskrl.models.architectures import ConfigError, TensorLayout, architecture_of
from deskrl.models.model_checks.placeholder_files import check_not_placeholder
from deskrl.models.model_checks.tokenizer import check_chat_template, check_tokenizer
from deskrl.models.model_checks.weights import check_weights

HINT = "copy the file from the original model"

_FILES = {
    "config.json": ("config.json",),
    "weights": ("*.safetensors",),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json",),
}
_SMALL_FILES = ("*.json", "*.jinja")


def check_complete(folder: Path, architecture: str | None = None) -> None:
    """Raise UserError unless learner and inference can load a model directory exactly as it was saved.

    Weights, tokenizer, chat template and image processor are compared with the architecture in config.json.

    Args:
        folder: model directory.
        architecture: value of `model.architecture`; None: the architecture is found by `model_type` in config.json.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found", "correct model.path, or unset it so that `deskrl up` builds a model")
    for what, names in _FILES.items():
        paths = [path for name in names for path in folder.glob(name)]
        if not any(path.is_file() or path.is_symlink() for path in paths):
            raise UserError(f"{folder}: {what} not found ({' or '.join(names)})", HINT)
    for pattern in _SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            check_not_placeholder(path)
    config = read_json_object(folder / "config.json", HINT)
    found = architecture_of(config, folder, architecture)
    try:
        layout = found.layout(config)
    except ConfigError as error:
        raise UserError(f"{folder / 'config.json'}: {error}", HINT) from error
    check_weights(folder, layout, is_quantized=config.get("quantization_config") is not None)
    check_tokenizer(folder, layout)
    check_chat_template(folder, layout.image_token)
    _check_image_processor(folder, layout)


def _check_image_processor(folder: Path, layout: TensorLayout) -> None:
    """Raise UserError if the image processor cuts images into other patches than the vision tower reads."""
    sizing = read_image_sizing(folder)
    for name, processed, read in (
        ("patch_size", sizing.patch_size, layout.patch_size),
        ("merge_size", sizing.merge_size, layout.merge_size),
    ):
        if processed != read:
            raise UserError(
                f"{folder}: the image processor has {name} = {processed}, but the vision tower in config.json has "
                f"{read}",
                "copy config.json and preprocessor_config.json from the same model",
            )
