"""The policy as the learner needs it: logprobs of action tokens under the sampling distribution.

Knows the Hugging Face model and its folder; knows nothing of rewards, ranks or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deskrl.core.errors import UserError
from deskrl.learner.batch import Collator, MicroBatch, PixelCache


class Scores(NamedTuple):
    """What a forward pass gives for each action token."""

    logprobs_N: Tensor
    entropy_N: Tensor
    """Of the whole sampling distribution; carries no gradient."""


class Policy(nn.Module):
    """A Qwen2.5-VL that scores action tokens.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        suppressed_ids: tokens that sampling never gives; they are masked here as they are there.
    """

    suppressed_ids: Tensor

    def __init__(self, model: Any, suppressed_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("suppressed_ids", torch.tensor(suppressed_ids, dtype=torch.long), persistent=False)

    def forward(self, batch: MicroBatch, temperature: float, suppress: bool = True) -> Scores:
        """Scores of a micro-batch's action tokens at a sampling temperature, in float32."""
        body = self.model.model
        hidden_BLD = body.language_model(
            inputs_embeds=self._embed(batch),
            position_ids=batch.position_ids_3BL,
            # Rows are padded on the right only, and a causal model never looks there: no mask is needed.
            attention_mask=None,
            use_cache=False,
        ).last_hidden_state
        logits_NV = self.model.lm_head(hidden_BLD[batch.row_N, batch.position_N]).float() / temperature
        if suppress:
            logits_NV = logits_NV.index_fill(1, self.suppressed_ids, float("-inf"))
        all_logprobs_NV = logits_NV.log_softmax(dim=-1)
        logprobs_N = all_logprobs_NV.gather(1, batch.target_N[:, None])[:, 0]
        with torch.no_grad():
            entropy_N = torch.special.entr(all_logprobs_NV.exp()).sum(dim=-1)
        return Scores(logprobs_N, entropy_N)

    def _embed(self, batch: MicroBatch) -> Tensor:
        """Token embeddings with each screenshot's features in its places; a screenshot is encoded once."""
        body = self.model.model
        embeds_BLD: Tensor = body.get_input_embeddings()(batch.input_ids_BL)
        if batch.pixel_values is None:
            return embeds_BLD
        encoded = body.get_image_features(batch.pixel_values, batch.grid_thw_U3, return_dict=True).pooler_output
        features = torch.cat([encoded[index] for index in batch.image_index_I.tolist()])
        is_image_BL1 = (batch.input_ids_BL == self.model.config.image_token_id)[..., None]
        return embeds_BLD.masked_scatter(is_image_BL1, features.to(embeds_BLD.dtype))


def load_policy(folder: Path, suppressed_ids: tuple[int, ...], freeze_vision: bool) -> Policy:
    """Load a model folder in Hugging Face layout, in float32.

    Raises:
        UserError: there is no such model, or it is of another architecture.
    """
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    mend = "name a folder with a Qwen2.5-VL model and its processor in model.path"
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "qwen2_5_vl":
            raise UserError(f"{folder} holds a {kind} model, which deskrl cannot train", mend)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model can be loaded from here ({_one_line(error)})", mend) from error
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    return Policy(model, suppressed_ids)


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
        pixels=PixelCache(processor.image_processor, fetch),
        image_token_id=policy.model.config.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id or 0,
        merge_size=policy.model.config.vision_config.spatial_merge_size,
        rope_index=rope_index,
    )


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
