"""A copy of a model folder with its language model in 4 bits, to serve it where memory is short.

Each matrix of the language model's layers becomes 4-bit integers with one scale for every 32 inputs, rounded to
nearest, in the layout that vLLM knows as compressed-tensors; embeddings, norms, head and vision tower stay as they are.
Knows files and tensors; knows no engine.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deskrl.core.runfolder import write_json

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
"""Inputs that share a scale."""
_BITS = 4
_MOST = 2 ** (_BITS - 1) - 1
_PER_WORD = 32 // _BITS

_INDEX = "model.safetensors.index.json"
_MATRIX = re.compile(r"\blayers\.\d+\.\w+\.\w+_proj\.weight$")
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*visual.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": _BITS,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}


def four_bit_copy(source: Path, target: Path) -> Path:
    """Write the copy, unless it is there; of several processes that want it, one writes and the others wait.

    Returns:
        `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            _write(source, target)
    return target


def _write(source: Path, target: Path) -> None:
    weight_map: dict[str, str] = {}
    for path in sorted(source.glob("*.safetensors")):
        weight_map |= dict.fromkeys(_convert(path, target / path.name), path.name)
    write_json(target / _INDEX, {"metadata": {}, "weight_map": weight_map})
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", _INDEX):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # The last: where it lies, all is there.
    write_json(target / "config.json", {**config, "quantization_config": _QUANTIZATION})


def _convert(source: Path, target: Path) -> list[str]:
    """Write one file's tensors; returns their names."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            tensor = file.get_tensor(name)
            tensors |= packed(name, tensor) if _MATRIX.search(name) else {name: tensor}
    save_file(tensors, target, metadata={"format": "pt"})
    return list(tensors)


def packed(name: str, weight_OI: Tensor) -> Mapping[str, Tensor]:
    """The tensors that stand for a matrix (outputs, inputs): eight integers a word, lowest first, and their scales."""
    import torch

    num_outputs, num_inputs = weight_OI.shape
    groups_OGK = weight_OI.float().reshape(num_outputs, -1, GROUP)
    scale_OG = (groups_OGK.abs().amax(dim=-1) / _MOST).clamp(min=torch.finfo(torch.float16).tiny)
    scale_OG = scale_OG.to(torch.float16 if weight_OI.dtype == torch.float32 else weight_OI.dtype)
    levels_OGK = (groups_OGK / scale_OG.float()[..., None]).round().clamp(-_MOST - 1, _MOST) + (_MOST + 1)
    nibbles_OWN = levels_OGK.reshape(num_outputs, -1, _PER_WORD).long()
    words_OW = (nibbles_OWN << (_BITS * torch.arange(_PER_WORD))).sum(dim=-1)
    return {
        f"{name}_packed": (words_OW - (words_OW >= 2**31).long() * 2**32).int(),
        f"{name}_scale": scale_OG,
        f"{name}_shape": torch.tensor([num_outputs, num_inputs]),
    }
