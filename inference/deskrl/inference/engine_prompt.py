"""Engine prompts: preprocessed token ids and screenshots in the input format of vLLM.

Everything that vLLM's own input processing would compute is computed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deskrl.core import prompt_rendering

if TYPE_CHECKING:
    from vllm.inputs import MultiModalInput, TokensInput
    from vllm.multimodal.inputs import MultiModalKwargsItem

    from deskrl.inference.image_preprocessing import ImagePatches

PATCHES_KEY = "deskrl_patches"
"""Key under which the bytes of a screenshot are sent to `vllm_worker_extension`.

It differs from the key of the floats that vLLM's own processor computes for the OpenAI endpoint, because vLLM batches
inputs with equal keys.
"""


@dataclass(frozen=True)
class EnginePrompt:
    """Token ids with one image token per screenshot, and (hash, patches) of the screenshots in the same order."""

    ids: Sequence[int]
    images: Sequence[tuple[str, ImagePatches]]


def to_vllm_input(
    processor: Any, prompt: EnginePrompt, image_token_id: int, *, resend: bool = False
) -> MultiModalInput | TokensInput:
    """Return a prompt as input for `AsyncLLM.generate`, which must be called immediately afterwards.

    Args:
        processor: input processor of the engine, which tracks the screenshots that are cached in the worker.
        prompt: prompt to convert.
        image_token_id: token id that represents a screenshot.
        resend: whether to send all screenshots, even those that are believed to be cached.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    if not prompt.images:
        return tokens_input(list(prompt.ids))
    counts = [patches.num_tokens for _, patches in prompt.images]
    ids, starts = prompt_rendering.expand_images_with_starts(prompt.ids, image_token_id, counts)
    hashes = {"image": [name for name, _ in prompt.images]}
    items = {"image": [_item(patches) for _, patches in prompt.images]}
    if not resend:
        # vLLM caches screenshots by hash in the worker: those in the cache are replaced by None and not sent again.
        processor.inject_into_mm_cache(hashes, items)
    ranges = [PlaceholderRange(offset=start, length=count) for start, count in zip(starts, counts, strict=True)]
    return mm_input(ids, MultiModalKwargsItems(items), hashes, {"image": ranges})


def _item(patches: ImagePatches) -> MultiModalKwargsItem:
    """Return a screenshot in the format in which vLLM sends it to the worker."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    data = BatchFeature({PATCHES_KEY: patches.levels_ND, "image_grid_thw": patches.grid_thw_3[None]})
    fields = {
        PATCHES_KEY: MultiModalFieldConfig.flat("image", [slice(0, len(patches.levels_ND))]),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs(data, fields)["image"][0]
