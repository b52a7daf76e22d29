"""Policy model: logprobs and entropies of action tokens under the sampling distribution, on a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deskrl.core.config import LoraConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.lru_cache import SharedLRUCache
from deskrl.learner.batches.collator import Collator, MicroBatch
from deskrl.learner.batches.image_processing import ProcessedImage, ScreenshotProcessor
from deskrl.learner.policy.architectures import LearnerArchitecture, check_transformers, load_learner_architecture
from deskrl.learner.policy.lora import Adapter
from deskrl.models.model_checks import check_complete

_TOKENS_AT_ONCE = 1024
"""Number of action tokens whose distribution over the vocabulary is held in float32 at a time."""


class Scores(NamedTuple):
    """Result of a forward pass for each of the N action tokens."""

    logprobs_N: Tensor
    """Logprob of each action token."""
    entropy_N: Tensor
    """Entropy of the whole sampling distribution at each action token; without gradient unless it is asked for."""


class Policy(nn.Module):
    """A vision-language model that scores action tokens.

    Args:
        model: transformers model for conditional generation; its attention and norms are replaced by faster versions.
        suppressed_ids: ids of tokens that are never sampled; their logits are masked, as the engine masks them.
        features: cache of the vision tower's output per screenshot, for a frozen tower; None disables caching.
        architecture: architecture of the model; None: the one of its `model_type`.

    Raises:
        UserError: the architecture is unknown, or adds or drops parameters of the model.
    """

    suppressed_ids: Tensor

    def __init__(
        self,
        model: Any,
        suppressed_ids: tuple[int, ...],
        features: SharedLRUCache[ProcessedImage] | None = None,
        architecture: LearnerArchitecture | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture or load_learner_architecture(model.config.model_type)
        _install(self.architecture, model)
        self.model = model
        self.features = features
        self.adapter: Adapter | None = None
        """LoRA adapter in the model; None: the model itself is trained."""
        self.register_buffer("suppressed_ids", torch.tensor(suppressed_ids, dtype=torch.long), persistent=False)

    def forward(
        self, batch: MicroBatch, temperature: float, suppress: bool = True, entropy_gradient: bool = False
    ) -> Scores:
        """Return scores of the action tokens of a micro-batch in float32.

        Args:
            batch: rows of tokens and screenshots, on the model's device.
            temperature: sampling temperature; divides the logits.
            suppress: whether to mask the tokens that are never sampled.
            entropy_gradient: whether the entropies carry a gradient too.
        """
        hidden_LD = self.architecture.hidden_states(self.model, batch, self._image_features(batch))
        # The vocabulary is large: logits are computed for action tokens only, in float32 for some of them at a time.
        pieces = [
            checkpoint(self._score, logits_NV, target_N, temperature, suppress, entropy_gradient, use_reentrant=False)
            for logits_NV, target_N in zip(
                torch.split(self.model.lm_head(hidden_LD[batch.position_N]), _TOKENS_AT_ONCE),
                torch.split(batch.target_N, _TOKENS_AT_ONCE),
                strict=True,
            )
        ]
        return Scores(torch.cat([piece.logprobs_N for piece in pieces]), torch.cat([p.entropy_N for p in pieces]))

    def add_adapter(self, config: LoraConfig, seed: int) -> None:
        """Freeze the model and add a LoRA adapter to it; arguments and errors as of `lora.Adapter`."""
        self.adapter = Adapter(self.model, self.architecture, config, seed)

    def _score(
        self, logits_NV: Tensor, target_N: Tensor, temperature: float, suppress: bool, entropy_gradient: bool
    ) -> Scores:
        logits_NV = logits_NV.float() / temperature
        if suppress:
            logits_NV = logits_NV.index_fill(1, self.suppressed_ids, float("-inf"))
        all_logprobs_NV = logits_NV.log_softmax(dim=-1)
        logprobs_N = all_logprobs_NV.gather(1, target_N[:, None])[:, 0]
        if entropy_gradient:
            # Masked tokens have probability 0; the derivative of `entr` is infinite there.
            finite_NV = all_logprobs_NV.masked_fill(all_logprobs_NV == float("-inf"), 0.0)
            return Scores(logprobs_N, -(all_logprobs_NV.exp() * finite_NV).sum(dim=-1))
        with torch.no_grad():
            entropy_N = torch.special.entr(all_logprobs_NV.exp()).sum(dim=-1)
        return Scores(logprobs_N, entropy_N)

    def _image_features(self, batch: MicroBatch) -> Tensor | None:
        """Return the features of the screenshots in the rows, in order; None if there are none."""
        if not batch.images:
            return None
        encoded = self._encode(batch.images)
        return torch.cat([encoded[place] for place in batch.image_indices])

    def _encode(self, images: Sequence[ProcessedImage]) -> list[Tensor]:
        """Return features of each screenshot; with a frozen vision tower, cached ones are reused."""
        features = {image.name: known for image in images if (known := self._known_features(image)) is not None}
        new = [image for image in images if image.name not in features]
        if new:
            pixel_values = torch.cat([image.pixel_values for image in new if image.pixel_values is not None])
            grid_thw_U3 = torch.stack([image.grid_thw_3 for image in new])
            output = self.architecture.encode_images(self.model, pixel_values, grid_thw_U3)
            features |= {image.name: encoded for image, encoded in zip(new, output, strict=True)}
        if self.features is not None:
            for image in new:
                # Cached in host memory: copying takes little time, and accelerator memory is scarce.
                kept = features[image.name].to("cpu", copy=True)
                seen = ProcessedImage(image.name, image.grid_thw_3.cpu(), None, kept)
                self.features[image.name] = seen
        return [features[image.name] for image in images]

    def _known_features(self, image: ProcessedImage) -> Tensor | None:
        """Return features included in the micro-batch, or cached since it was created, or None."""
        if image.features is not None or self.features is None:
            return image.features
        known = self.features.get(image.name)
        return None if known is None or known.features is None else known.features.to(image.grid_thw_3.device)


def _install(architecture: LearnerArchitecture, model: Any) -> None:
    """Replace layers of a model; raises UserError if its parameters are not those of before."""
    before = {name for name, _ in model.named_parameters()}
    architecture.install(model)
    changed = before ^ {name for name, _ in model.named_parameters()}
    if changed:
        raise UserError(
            f"install of {type(architecture).__name__} adds or drops {len(changed)} parameters, such as {min(changed)}",
            "keep every parameter of a layer under its name when you replace the layer",
        )


def load_policy(
    folder: Path,
    suppressed_ids: tuple[int, ...],
    freeze_vision: bool,
    dtype: torch.dtype = torch.float32,
    feature_cache_bytes: int = 0,
    architecture: str | None = None,
) -> Policy:
    """Load the policy from a model folder in Hugging Face layout.

    Args:
        folder: model folder.
        suppressed_ids: ids of tokens that are never sampled.
        freeze_vision: whether to exclude the vision tower from training.
        dtype: numeric type of the weights.
        feature_cache_bytes: limit on the cache of a frozen vision tower's features, in host memory; 0 disables it.
        architecture: value of `model.architecture`; None: the architecture is found by `model_type` in config.json.

    Raises:
        UserError: the model is missing, damaged, or of an unsupported architecture.
    """
    from transformers import AutoModelForImageTextToText

    check_complete(folder, architecture)
    part = load_learner_architecture(architecture or read_json_object(folder / "config.json", "")["model_type"])
    check_transformers(part.model_type)
    hint = "copy the model folder from its source again"
    try:
        model: Any
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot load the model ({one_line(error, 300)})", hint) from error
    # transformers fills such tensors at random; `check_complete` names them, unless the files changed in between.
    unfilled = [*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"]), *loading["error_msgs"]]
    if unfilled:
        problem = f"{len(unfilled)} tensors of the model are missing or have another shape, such as {unfilled[0]}"
        raise UserError(f"{folder}: {one_line(problem, 300)}", hint)
    if freeze_vision:
        part.vision_tower(model).requires_grad_(False)
    features: SharedLRUCache[ProcessedImage] | None = None
    if freeze_vision and feature_cache_bytes > 0:
        features = SharedLRUCache(feature_cache_bytes, attrgetter("num_bytes"))
    return Policy(model, suppressed_ids, features, part)


def load_processor(folder: Path) -> Any:
    """Load the processor of a model folder: tokenizer and image processor.

    Raises:
        UserError: the processor is missing or damaged.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        hint = "copy preprocessor_config.json and the tokenizer's files from the original model into the folder"
        raise UserError(f"{folder}: cannot load the processor ({one_line(error, 300)})", hint) from error


def make_collator(policy: Policy, processor: Any, fetch: Callable[[Collection[str]], Mapping[str, bytes]]) -> Collator:
    """Return the collator for a policy.

    Args:
        policy: policy whose vision tower and position indices determine the micro-batches.
        processor: processor of its model folder.
        fetch: returns the bytes of screenshots by their hashes.
    """
    return Collator(
        screenshots=ScreenshotProcessor(processor.image_processor, fetch, policy.features),
        image_token_id=policy.model.config.image_token_id,
        merge_size=policy.model.config.vision_config.spatial_merge_size,
        rope_index=partial(policy.architecture.position_ids, policy.model),
    )
