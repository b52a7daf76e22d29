"""The learner's part of GLM-4.1V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deskrl.learner.policy.architectures.chat_format import GLM_CHAT
from deskrl.learner.policy.architectures.learner_architecture import TINY_MERGE, TINY_PATCH_PIXELS
from deskrl.learner.policy.architectures.vision_tower_learner import VisionTowerLearner

_TINY_TEXT: Mapping[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "attention_bias": True,  # transformers does not read it, but vLLM does
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
        "partial_rotary_factor": 0.5,
    },
}
_TINY_VISION: Mapping[str, Any] = {
    "patch_size": TINY_PATCH_PIXELS,
    "temporal_patch_size": 2,
    "spatial_merge_size": TINY_MERGE,
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": 192,
    "image_size": 8 * TINY_PATCH_PIXELS,
}


class Glm4VLearner(VisionTowerLearner):
    """GLM-4.1V."""

    model_type = "glm4v"
    processor_class = "Glm4vProcessor"
    image_processor_type = "Glm4vImageProcessor"
    video_processor_type = "Glm4vVideoProcessor"
    counts_frames = True
    chat_format = GLM_CHAT

    def tiny_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the sizes of a model with about three million parameters."""
        return {"text_config": _TINY_TEXT, "vision_config": _TINY_VISION}

    def slow_layers(self) -> tuple[type, Sequence[type]]:
        """Return transformers' classes."""
        from transformers.models.glm4v.modeling_glm4v import Glm4VisionMlp, Glm4vRMSNorm

        return Glm4VisionMlp, [Glm4vRMSNorm]
