"""Checks of the weight files of a model directory: they hold exactly the tensors of its architecture."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.models.architectures import HEAD, TensorLayout
from deskrl.models.model_checks.placeholder_files import COPY_HINT, check_not_placeholder
from deskrl.models.model_checks.safetensors_header import TensorInfo, read_header

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
_ANCHORS = ("visual.patch_embed.proj.weight", "embed_tokens.weight")
"""Tensors by whose names a prefix is recognised: one of the vision tower, and one of the language model."""
_PREFIXES = ({"", "model."}, {"model.", "model.language_model."})
"""Prefixes of these tensors in published models and in models saved by transformers since 4.52."""
_MERGE_HINT = "merge the adapter into its model (`deskrl merge-adapter`, or PEFT: merge_and_unload)"
_SAMPLE_BYTES = 256
"""Bytes of each tensor that enter the fingerprint of a model."""


def check_weights(folder: Path, layout: TensorLayout, *, is_quantized: bool) -> None:
    """Check that the weight files of a model directory are complete, undamaged, and match its architecture.

    Both ways of naming tensors that transformers and vLLM load are accepted. The matrices of a quantised model have
    other types, shapes and names, so only their presence is checked.

    Raises:
        UserError: a file or a tensor is missing, damaged, superfluous, or of another shape or type.
    """
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(f"{adapter}: the directory holds an adapter, not a whole model", _MERGE_HINT)
    tensors = _read_tensors(folder)
    _check_prefixes(tensors)
    found = {_published_name(name): tensor for name, tensor in tensors.items()}
    stems = {name.rpartition(".")[0] for name in found}
    for name, shape in layout.tensors.items():
        is_matrix = name.endswith(".weight") and len(shape) == 2
        if name not in found:
            if is_quantized and is_matrix and name.removesuffix(".weight") in stems:
                continue
            raise _missing(folder, name, layout.tensors.keys() - found.keys())
        if not (is_quantized and is_matrix):
            _check_tensor(name, found[name], shape)
    for name, tensor in tensors.items():
        _check_known(name, tensor, layout, is_quantized=is_quantized)


def fingerprint_weights(folder: Path) -> str:
    """Return a hash that identifies the weights of a model directory, by the middle of each tensor.

    It is the same for both ways of naming tensors, and for any distribution over files.

    Raises:
        UserError: a file is missing or damaged.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_published_name(name), tensor) for name, tensor in _read_tensors(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with open(tensor.file, "rb") as file:
            file.seek(tensor.start + max(0, tensor.num_bytes - _SAMPLE_BYTES) // 2)
            digest.update(file.read(min(tensor.num_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()[:16]


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a directory by their names in the files."""
    present = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    weight_map = _read_index(folder, present)
    wanted = sorted(set(weight_map.values())) if weight_map is not None else [_SINGLE]
    for name in wanted:
        if name not in present:
            raise UserError(f"{folder / name}: not found, although {_INDEX} names it", COPY_HINT)
    for name, path in present.items():
        if name not in wanted:
            reader = _INDEX if weight_map is not None else f"{_SINGLE}, the only file that is loaded"
            raise UserError(f"{path}: not part of {reader}", "move the file out of the model directory")
    tensors: dict[str, TensorInfo] = {}
    for path in present.values():
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is also in {tensors[name].file.name}", COPY_HINT)
            if weight_map is not None and weight_map.get(name) != path.name:
                known = weight_map.get(name)
                reason = f"{_INDEX} places it in {known}" if known else f"{_INDEX} does not name it"
                raise UserError(f"{path}: contains tensor {name}, but {reason}", COPY_HINT)
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise UserError(f"{folder / file}: tensor {name}, which {_INDEX} names, is missing", COPY_HINT)
    return tensors


def _read_index(folder: Path, present: Mapping[str, Path]) -> dict[str, str] | None:
    """Return the file of each tensor according to the index; None if there is a single weight file without one."""
    path = folder / _INDEX
    if not path.exists() and not path.is_symlink():
        if _SINGLE not in present:
            shards = sorted(present)
            if len(shards) == 1 and not re.search(r"-of-\d+\.", shards[0]):
                raise UserError(f"{present[shards[0]]}: must be called {_SINGLE}", f"rename the file to {_SINGLE}")
            raise UserError(f"{path}: not found, but {shards[0]} is one of several shards", COPY_HINT)
        return None
    if _SINGLE in present and len(present) > 1:
        raise UserError(
            f"{folder}: contains both {_SINGLE} and shards with {_INDEX}", "remove the weights that are out of date"
        )
    check_not_placeholder(path)
    weight_map = read_json_object(path, COPY_HINT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise UserError(f"{path}: has no valid weight_map", COPY_HINT)
    return weight_map


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and "/" not in value


def _published_name(name: str) -> str:
    """Return the name of a tensor in published models."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name


def _check_prefixes(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UserError if the names of tensors begin with the name of a wrapper."""
    for anchor, accepted in zip(_ANCHORS, _PREFIXES, strict=True):
        name = next((name for name in tensors if name == anchor or name.endswith(f".{anchor}")), None)
        if name is None or (prefix := name.removesuffix(anchor)) in accepted:
            continue
        expected = " or ".join(f"{other}{anchor}" for other in sorted(accepted, key=len))
        hint = _MERGE_HINT if "base_model" in prefix else "save the model without its wrapper, so that names match"
        raise UserError(f"{tensors[name].file}: tensor {name} must be called {expected}", hint)


def _missing(folder: Path, name: str, missing: set[str]) -> UserError:
    others = f" and {len(missing) - 1} others are missing" if len(missing) > 1 else " is missing"
    file = _INDEX if (folder / _INDEX).exists() else _SINGLE
    reason = f"{folder / file}: tensor {name}{others}, which config.json requires"
    if name == HEAD:
        return UserError(reason, "copy it, or set tie_word_embeddings in config.json as in the original model")
    return UserError(reason, "copy config.json and all weight files from the same model")


def _check_tensor(name: str, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json requires {list(shape)}",
            "copy config.json and all weight files from the same model",
        )
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"{tensor.file}: tensor {name} has type {tensor.dtype}, but config.json has no quantization_config",
            "copy config.json from the same model, or use a model with weights of 16 or 32 bits",
        )


def _check_known(name: str, tensor: TensorInfo, layout: TensorLayout, *, is_quantized: bool) -> None:
    """Raise UserError if a tensor does not belong to the architecture."""
    published = _published_name(name)
    if published in layout.tensors:
        return
    if published == HEAD and tensor.shape == layout.tensors["model.embed_tokens.weight"]:
        return  # a copy of the tied embedding matrix, which is not loaded
    if is_quantized and _belongs_to_matrix(published, layout):
        return
    hint = _MERGE_HINT if "lora_" in name or ".base_layer." in name else "remove it, or copy the original model again"
    raise UserError(f"{tensor.file}: tensor {name} does not belong to the architecture in config.json", hint)


def _belongs_to_matrix(name: str, layout: TensorLayout) -> bool:
    """Return whether a tensor, such as a scale, describes a quantised matrix of the architecture or a cache."""
    stem = name
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if f"{stem}.weight" in layout.tensors:
            return True
    return name.endswith("_scale")
