"""Prompts as vLLM's own processing would leave them, so that vLLM has nothing left to process.

Knows vLLM's inputs; knows nothing of how they are sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deskrl.core import rendering

if TYPE_CHECKING:
    from vllm.inputs import MultiModalInput, TokensInput
    from vllm.multimodal.inputs import MultiModalKwargsItem

    from deskrl.inference.pixels import Patches

PATCHES_KEY = "deskrl_patches"
"""What a screenshot's bytes are called on their way to `worker`. Another name than that of the floats that vLLM's own
processor makes for its OpenAI endpoint, because vLLM batches what has the same names."""


@dataclass(frozen=True)
class Prompt:
    """Token ids with one image token per screenshot, and the screenshots by hash in the same order."""

    ids: Sequence[int]
    images: Sequence[tuple[str, Patches]]


def engine_input(
    processor: Any, prompt: Prompt, image_token_id: int, *, resend: bool = False
) -> MultiModalInput | TokensInput:
    """A prompt for `AsyncLLM.generate`, to be called right before it.

    Args:
        processor: the engine's input processor, which knows what lies beside the model.
        prompt: what is to be continued.
        image_token_id: stands for a part of a screenshot.
        resend: send all screenshots, whatever is believed to lie there.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    if not prompt.images:
        return tokens_input(list(prompt.ids))
    counts = [patches.num_tokens for _, patches in prompt.images]
    ids, starts = rendering.place_images(prompt.ids, image_token_id, counts)
    names = {"image": [name for name, _ in prompt.images]}
    items = {"image": [_item(patches) for _, patches in prompt.images]}
    if not resend:
        # vLLM keeps screenshots by name beside the model: what lies there already becomes None, and is not sent.
        processor.inject_into_mm_cache(names, items)
    places = [PlaceholderRange(offset=start, length=count) for start, count in zip(starts, counts, strict=True)]
    return mm_input(ids, MultiModalKwargsItems(items), names, {"image": places})


def _item(patches: Patches) -> MultiModalKwargsItem:
    """A screenshot as vLLM carries it to the worker."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    data = BatchFeature({PATCHES_KEY: patches.levels_ND, "image_grid_thw": patches.grid_thw_3[None]})
    fields = {
        PATCHES_KEY: MultiModalFieldConfig.flat("image", [slice(0, len(patches.levels_ND))]),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs(data, fields)["image"][0]
