"""The learner's part of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from deskrl.learner.policy.architectures.learner_architecture import TINY_MERGE, TINY_PATCH_PIXELS
from deskrl.learner.policy.architectures.vision_tower_learner import VisionTowerLearner

_TINY_TEXT: Mapping[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
_TINY_PATCHES = {"patch_size": TINY_PATCH_PIXELS, "temporal_patch_size": 1, "spatial_merge_size": TINY_MERGE}


class _QwenVL(VisionTowerLearner):
    """What the two architectures have in common."""

    attention_mask: ClassVar[Any] = {"full_attention": None}  # with None, the language model would make a mask
    _tiny_vision: ClassVar[Mapping[str, Any]]

    def tiny_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the sizes of a model with about two and a half million parameters."""
        return {"text_config": _TINY_TEXT, "vision_config": {**_TINY_PATCHES, **self._tiny_vision}}

    def slow_layers(self) -> tuple[type, Sequence[type]]:
        """Return transformers' classes, of which Qwen2-VL uses some of Qwen2.5-VL."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP, Qwen2_5_VLRMSNorm
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

        return Qwen2_5_VLMLP, [Qwen2VLRMSNorm, Qwen2_5_VLRMSNorm]


class Qwen2VLLearner(_QwenVL):
    """Qwen2-VL."""

    model_type = "qwen2_vl"
    processor_class = "Qwen2VLProcessor"
    # embed_dim is the width of the tower and hidden_size the width of its output.
    _tiny_vision: ClassVar[Mapping[str, Any]] = {
        "depth": 2,
        "embed_dim": 128,
        "mlp_ratio": 2,
        "num_heads": 2,
        "hidden_size": 192,
    }


class Qwen25VLLearner(_QwenVL):
    """Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    processor_class = "Qwen2_5_VLProcessor"
    _tiny_vision: ClassVar[Mapping[str, Any]] = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": 192,
        "window_size": 4 * TINY_PATCH_PIXELS * TINY_MERGE,
        "fullatt_block_indexes": [0, 1],
    }
