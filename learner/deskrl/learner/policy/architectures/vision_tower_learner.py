"""The learner's part that architectures with a vision tower `visual` and positions of three axes have in common.

Suffixes: L positions of all rows, D hidden size, T image tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from deskrl.learner.policy.architectures.learner_architecture import LearnerArchitecture, embed_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from deskrl.learner.batches.collator import MicroBatch


class VisionTowerLearner(LearnerArchitecture):
    """Architecture whose language model reads the output of the vision tower at the positions of image tokens."""

    attention_mask: ClassVar[Any] = None
    """Value of the language model's argument that stands for no mask: the sequence lengths separate the rows."""

    @abstractmethod
    def slow_layers(self) -> tuple[type, Sequence[type]]:
        """Return transformers' class of MLPs that may be padded, and its classes of norms that may be fused."""

    def language_model(self, model: Any) -> Any:
        """Return the decoder layers."""
        return model.model.language_model

    def vision_tower(self, model: Any) -> Any:
        """Return the vision tower."""
        return model.model.visual

    def install(self, model: Any) -> None:
        """Install variable-length attention, fused norms and padded MLPs."""
        from deskrl.learner.policy import fused_layers, varlen_attention

        mlp, norms = self.slow_layers()
        varlen_attention.install(self.language_model(model))
        varlen_attention.install(self.vision_tower(model))
        fused_layers.project_patches(self.vision_tower(model).patch_embed)
        fused_layers.pad_mlps(model.model, mlp)
        fused_layers.replace_norms(model.model, *norms)

    def position_ids(
        self, model: Any, input_ids_1L: Tensor, image_mask_1L: Tensor, grid_thw_U3: Tensor | None
    ) -> Tensor:
        """Return multimodal position ids: one per axis of a screenshot."""
        positions: Tensor
        positions, _ = model.model.get_rope_index(input_ids_1L, image_mask_1L, image_grid_thw=grid_thw_U3)
        return positions

    def encode_images(self, model: Any, pixel_values: Tensor, grid_thw_U3: Tensor) -> Sequence[Tensor]:
        """Return the output of the merger after the vision tower."""
        output: Sequence[Tensor]
        output = model.model.get_image_features(pixel_values, grid_thw_U3, return_dict=True).pooler_output
        return output

    def split_features(self, model: Any, batch: MicroBatch, features_TD: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """Return what stands at the positions of image tokens, and further arguments of the language model."""
        return features_TD, {}

    def hidden_states(self, model: Any, batch: MicroBatch, features: Tensor | None) -> Tensor:
        """Run the language model on token embeddings with features at the positions of image tokens."""
        from deskrl.learner.policy import varlen_attention

        output_TD, arguments = (None, {}) if features is None else self.split_features(model, batch, features)
        embeds_LD = embed_tokens(model, batch, output_TD)
        lengths = varlen_attention.make_lengths(batch.row_lengths, embeds_LD.device)
        hidden_LD: Tensor = self.language_model(model)(
            inputs_embeds=embeds_LD[None],
            position_ids=batch.position_ids_3L[:, None],
            attention_mask=self.attention_mask,
            use_cache=False,
            **lengths.as_arguments(),
            **arguments,
        ).last_hidden_state[0]
        return hidden_LD
