"""Copy of a model folder with the language model quantised to 4 bits, for replicas with little memory.

Each matrix in the layers of the language model is rounded to the nearest 4-bit integers with one scale per 32 inputs,
in the compressed-tensors format that vLLM reads. Embeddings, norms, head and vision tower remain unchanged.

Written by hand, because rounding to nearest takes a few lines and llm-compressor would be a large dependency.
"""

from __future__ import annotations

import fcntl
import json
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZE = 32
"""Number of inputs that share a scale."""
_BITS = 4
_MAX_LEVEL = 2 ** (_BITS - 1) - 1
_LEVELS_PER_WORD = 32 // _BITS

_CPU_INFO = Path("/proc/cpuinfo")
_INDEX = "model.safetensors.index.json"
_MATRIX = re.compile(r"\blayers\.\d+\.\w+\.\w+_proj\.weight$")
_QUANTIZATION_CONFIG = {
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
                "group_size": GROUP_SIZE,
            },
        }
    },
}


def check_processor() -> None:
    """Raise UserError if vLLM has no 4-bit kernel for the processor of this machine; for replicas on a CPU."""
    if platform.machine() == "x86_64" and " avx512f " not in _CPU_INFO.read_text(encoding="utf-8"):
        raise UserError(
            "inference.quantization = int4: vLLM's 4-bit kernel for CPUs needs AVX-512, which this processor lacks",
            "unset inference.quantization, or use a machine with AVX-512 or a GPU",
        )


def make_int4_copy(source: Path, target: Path) -> Path:
    """Write the quantised copy of a model folder unless it exists; safe for concurrent processes.

    Args:
        source: model folder.
        target: folder of the copy.

    Returns:
        `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            _write_copy(source, target)
    return target


def _write_copy(source: Path, target: Path) -> None:
    weight_map: dict[str, str] = {}
    for path in sorted(source.glob("*.safetensors")):
        weight_map |= dict.fromkeys(_convert_file(path, target / path.name), path.name)
    write_json(target / _INDEX, {"metadata": {}, "weight_map": weight_map})
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", _INDEX):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # Written last: its existence means that the copy is complete.
    write_json(target / "config.json", {**config, "quantization_config": _QUANTIZATION_CONFIG})


def _convert_file(source: Path, target: Path) -> list[str]:
    """Quantise the tensors of one file; return the names of the written tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, `safe_open` is not iterable
            tensor = file.get_tensor(name)
            tensors |= pack_int4(name, tensor) if _MATRIX.search(name) else {name: tensor}
    save_file(tensors, target, metadata={"format": "pt"})
    return list(tensors)


def pack_int4(name: str, weight_OI: Tensor) -> Mapping[str, Tensor]:
    """Quantise a matrix (outputs, inputs).

    Args:
        name: name of the matrix in the checkpoint.
        weight_OI: matrix.

    Returns:
        Tensors of the compressed-tensors format by name: levels packed eight to a word (lowest bits first), scales, and
        the shape of the matrix.
    """
    import torch

    num_outputs, num_inputs = weight_OI.shape
    groups_OGK = weight_OI.float().reshape(num_outputs, -1, GROUP_SIZE)
    scale_OG = (groups_OGK.abs().amax(dim=-1) / _MAX_LEVEL).clamp(min=torch.finfo(torch.float16).tiny)
    scale_OG = scale_OG.to(torch.float16 if weight_OI.dtype == torch.float32 else weight_OI.dtype)
    levels_OGK = (groups_OGK / scale_OG.float()[..., None]).round().clamp(-_MAX_LEVEL - 1, _MAX_LEVEL) + (
        _MAX_LEVEL + 1
    )
    nibbles_OWN = levels_OGK.reshape(num_outputs, -1, _LEVELS_PER_WORD).long()
    words_OW = (nibbles_OWN << (_BITS * torch.arange(_LEVELS_PER_WORD))).sum(dim=-1)
    return {
        f"{name}_packed": (words_OW - (words_OW >= 2**31).long() * 2**32).int(),
        f"{name}_scale": scale_OG,
        f"{name}_shape": torch.tensor([num_outputs, num_inputs]),
    }
