"""The policy as the learner needs it: logprobs of action tokens under the sampling distribution.

Knows the Hugging Face model and its folder; knows nothing of rewards, ranks or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deskrl.core.byte_cache import ByteCache
from deskrl.core.errors import UserError
from deskrl.core.model_folder import refuse_incomplete
from deskrl.learner.batches.batch import Collator, MicroBatch
from deskrl.learner.batches.images import ProcessedImage, Screenshots
from deskrl.learner.policy import attention, fused

_TOKENS_AT_ONCE = 1024
"""Action tokens whose distribution over the vocabulary is held in float32 at a time."""


class Scores(NamedTuple):
    """What a forward pass gives for each action token."""

    logprobs_N: Tensor
    entropy_N: Tensor
    """Of the whole sampling distribution; carries no gradient."""


class Policy(nn.Module):
    """A Qwen2-VL or Qwen2.5-VL that scores action tokens.

    Args:
        model: transformers' own, for conditional generation; its attention and its norms are replaced by faster ones.
        suppressed_ids: tokens that sampling never gives; they are masked here as they are there.
        features: keeps what the vision tower makes of a screenshot, for a tower that does not learn.
    """

    suppressed_ids: Tensor

    def __init__(
        self, model: Any, suppressed_ids: tuple[int, ...], features: ByteCache[ProcessedImage] | None = None
    ) -> None:
        super().__init__()
        attention.install(model.model.language_model)
        attention.install(model.model.visual)
        fused.install(model.model)
        self.model = model
        self.features = features
        self.register_buffer("suppressed_ids", torch.tensor(suppressed_ids, dtype=torch.long), persistent=False)

    def forward(self, batch: MicroBatch, temperature: float, suppress: bool = True) -> Scores:
        """Scores of a micro-batch's action tokens at a sampling temperature, in float32."""
        embeds_LD = self._embed(batch)
        lengths = attention.lengths_of(batch.row_lengths, embeds_LD.device)
        hidden_LD = self.model.model.language_model(
            inputs_embeds=embeds_LD[None],
            position_ids=batch.position_ids_3L[:, None],
            attention_mask={"full_attention": None},  # nothing to prepare: the lengths part the rows
            use_cache=False,
            **lengths.as_arguments(),
        ).last_hidden_state[0]
        # Logits are wide: only those of action tokens are made, and only some of them at a time in float32.
        pieces = [
            checkpoint(self._score, logits_NV, target_N, temperature, suppress, use_reentrant=False)
            for logits_NV, target_N in zip(
                torch.split(self.model.lm_head(hidden_LD[batch.position_N]), _TOKENS_AT_ONCE),
                torch.split(batch.target_N, _TOKENS_AT_ONCE),
                strict=True,
            )
        ]
        return Scores(torch.cat([piece.logprobs_N for piece in pieces]), torch.cat([p.entropy_N for p in pieces]))

    def _score(self, logits_NV: Tensor, target_N: Tensor, temperature: float, suppress: bool) -> Scores:
        logits_NV = logits_NV.float() / temperature
        if suppress:
            logits_NV = logits_NV.index_fill(1, self.suppressed_ids, float("-inf"))
        all_logprobs_NV = logits_NV.log_softmax(dim=-1)
        logprobs_N = all_logprobs_NV.gather(1, target_N[:, None])[:, 0]
        with torch.no_grad():
            entropy_N = torch.special.entr(all_logprobs_NV.exp()).sum(dim=-1)
        return Scores(logprobs_N, entropy_N)

    def _embed(self, batch: MicroBatch) -> Tensor:
        """Token embeddings with each screenshot's features in its places."""
        embeds_LD: Tensor = self.model.model.get_input_embeddings()(batch.input_ids_L)
        if not batch.images:
            return embeds_LD
        encoded = self._encode(batch.images)
        features = torch.cat([encoded[place] for place in batch.image_places])
        is_image_L1 = (batch.input_ids_L == self.model.config.image_token_id)[:, None]
        return embeds_LD.masked_scatter(is_image_L1, features.to(embeds_LD.dtype))

    def _encode(self, images: Sequence[ProcessedImage]) -> list[Tensor]:
        """Features of each screenshot; a frozen vision tower sees only those that it has not made them of before."""
        features = {image.name: known for image in images if (known := self._known_features(image)) is not None}
        new = [image for image in images if image.name not in features]
        if new:
            pixel_values = torch.cat([image.pixel_values for image in new if image.pixel_values is not None])
            grid_thw_U3 = torch.stack([image.grid_thw_3 for image in new])
            output = self.model.model.get_image_features(pixel_values, grid_thw_U3, return_dict=True).pooler_output
            features |= {image.name: made for image, made in zip(new, output, strict=True)}
        if self.features is not None:
            for image in new:
                # On the host: a copy takes no time, and the accelerator has better use for its memory.
                kept = features[image.name].to("cpu", copy=True)
                seen = ProcessedImage(image.name, image.grid_thw_3.cpu(), None, kept)
                self.features.put(image.name, seen, seen.num_bytes)
        return [features[image.name] for image in images]

    def _known_features(self, image: ProcessedImage) -> Tensor | None:
        """They came along, or were made after the micro-batch was."""
        if image.features is not None or self.features is None:
            return image.features
        known = self.features.get(image.name)
        return None if known is None or known.features is None else known.features.to(image.grid_thw_3.device)


def load_policy(
    folder: Path,
    suppressed_ids: tuple[int, ...],
    freeze_vision: bool,
    dtype: torch.dtype = torch.float32,
    feature_cache_bytes: int = 0,
) -> Policy:
    """Load a model folder in Hugging Face layout.

    Args:
        folder: of the model.
        suppressed_ids: tokens that sampling never gives.
        freeze_vision: leave the vision tower as it is.
        dtype: of the weights.
        feature_cache_bytes: of what a frozen vision tower has made of screenshots; kept in the host's memory.

    Raises:
        UserError: there is no such model, it is of another architecture, or it is damaged.
    """
    from transformers import AutoModelForImageTextToText

    refuse_incomplete(folder)
    mend = "copy it from the original model"
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model can be loaded from here ({_one_line(error)})", mend) from error
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    keeps_features = freeze_vision and feature_cache_bytes > 0
    features: ByteCache[ProcessedImage] | None = ByteCache(feature_cache_bytes) if keeps_features else None
    return Policy(model, suppressed_ids, features)


def load_processor(folder: Path) -> Any:
    """The folder's processor: tokenizer and image processor.

    Raises:
        UserError: it is missing or damaged.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        mend = "copy preprocessor_config.json and the tokenizer's files beside the model"
        raise UserError(f"{folder}: no processor can be loaded from here ({_one_line(error)})", mend) from error


def make_collator(policy: Policy, processor: Any, fetch: Callable[[Collection[str]], Mapping[str, bytes]]) -> Collator:
    """The collator that fits a policy and its processor; `fetch` gives bytes of screenshots by hash."""
    body = policy.model.model

    def rope_index(input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        positions: Tensor
        positions, _ = body.get_rope_index(input_ids, mm_token_type_ids, image_grid_thw=image_grid_thw)
        return positions

    return Collator(
        screenshots=Screenshots(processor.image_processor, fetch, policy.features),
        image_token_id=policy.model.config.image_token_id,
        merge_size=policy.model.config.vision_config.spatial_merge_size,
        rope_index=rope_index,
    )


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
