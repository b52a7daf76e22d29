"""The learner's part of Qwen3-VL (dense). Suffixes: L positions of all rows, D hidden size, T image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deskrl.learner.policy.architectures.learner_architecture import TINY_MERGE, TINY_PATCH_PIXELS
from deskrl.learner.policy.architectures.vision_tower_learner import VisionTowerLearner

if TYPE_CHECKING:
    from torch import Tensor

    from deskrl.learner.batches.collator import MicroBatch

_TINY_TEXT: Mapping[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # the heads are together wider than the hidden states, as in the published model of 4B
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
_TINY_VISION: Mapping[str, Any] = {
    "patch_size": TINY_PATCH_PIXELS,
    "temporal_patch_size": 1,
    "spatial_merge_size": TINY_MERGE,
    "depth": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": 192,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


class Qwen3VLLearner(VisionTowerLearner):
    """Qwen3-VL: the features of an image token are the output of the vision tower and its levels (DeepStack)."""

    model_type = "qwen3_vl"
    processor_class = "Qwen3VLProcessor"

    def tiny_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the sizes of a model with about three million parameters."""
        return {"text_config": _TINY_TEXT, "vision_config": _TINY_VISION}

    def slow_layers(self) -> tuple[type, Sequence[type]]:
        """Return transformers' classes."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm

        return Qwen3VLTextMLP, [Qwen3VLTextRMSNorm]

    def encode_images(self, model: Any, pixel_values: Tensor, grid_thw_U3: Tensor) -> Sequence[Tensor]:
        """Return the output of the vision tower and its levels side by side, of shape (T, (1 + levels) D)."""
        import torch

        output = model.model.get_image_features(pixel_values, grid_thw_U3, return_dict=True)
        # transformers before 5.18 splits the output by image, but not its levels.
        levels = [torch.cat(level) if isinstance(level, tuple) else level for level in output.deepstack_features]
        features_TD = torch.cat([torch.cat(output.pooler_output), *levels], dim=-1)
        return torch.split(features_TD, [len(of_image) for of_image in output.pooler_output])

    def split_features(self, model: Any, batch: MicroBatch, features_TD: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the output of the vision tower, and its levels, which are added after the first layers, one each."""
        import torch

        output_TD, *levels = torch.split(features_TD, model.config.vision_config.out_hidden_size, dim=-1)
        is_image_1L = (batch.input_ids_L == model.config.image_token_id)[None]
        return output_TD, {"visual_pos_masks": is_image_1L, "deepstack_visual_embeds": levels}
