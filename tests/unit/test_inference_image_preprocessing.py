"""Image preprocessing: the policy sees exactly the floats that its own image processor computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import read_image_sizing
from deskrl.inference.image_preprocessing import PatchProcessor, normalise_patches
from deskrl.inference.logit_mask import MaskedSampler

SETTINGS: dict[str, dict[str, Any]] = {
    # Settings as published with Qwen2.5-VL, Qwen3-VL and GLM-4.1V, and those of tiny models.
    "qwen": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
    "tiny": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 28,
        "temporal_patch_size": 1,
        "size": {"shortest_edge": 504 * 280, "longest_edge": 504 * 280},
    },
    "qwen3": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "glm": {
        "image_processor_type": "Glm4vImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    },
    "tiny glm": {
        "image_processor_type": "Glm4vImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 28,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 2 * 504 * 280, "longest_edge": 2 * 504 * 280},
    },
}


def processor_folder(folder: Path, name: str) -> Path:
    config = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, **SETTINGS[name]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def noise_image(width: int, height: int) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080), (504, 280), (333, 1001), (57, 31)])
@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_and_table_yield_the_floats_of_the_processor(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor

    folder = processor_folder(tmp_path, name)
    expected = AutoImageProcessor.from_pretrained(folder)(images=[noise_image(*size)], return_tensors="pt")
    processor = PatchProcessor(folder)
    patches, table = processor.patches(noise_image(*size)), processor.normalisation_table()
    assert patches.levels_ND.dtype == torch.uint8
    assert torch.equal(patches.grid_thw_3, expected["image_grid_thw"][0])
    floats_ND = normalise_patches(patches.levels_ND, torch.tensor(table.values), table.num_frames)
    assert torch.equal(floats_ND, expected["pixel_values"])
    assert patches.num_tokens == read_image_sizing(folder).num_tokens(*size)


def test_a_folder_without_an_image_processor_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the image processor cannot be loaded"):
        PatchProcessor(tmp_path)


def test_the_masked_sampler_sets_suppressed_logits_to_minus_infinity_and_delegates_everything_else() -> None:
    class Sampler:
        logprobs_mode = "processed_logprobs"

        def __call__(self, logits: torch.Tensor, sampling_metadata: str) -> tuple[torch.Tensor, str]:
            return logits, sampling_metadata

    masked = MaskedSampler(Sampler(), [1, 3], vocab_size=4)
    logits, metadata = masked(logits=torch.tensor([[1.0, 2.0, 3.0, 4.0]]), sampling_metadata="as given")
    assert (logits.tolist(), metadata) == ([[1.0, -torch.inf, 3.0, -torch.inf]], "as given")
    assert masked.logprobs_mode == "processed_logprobs"
