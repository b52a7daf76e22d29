"""Published model folders: a folder in the format of UI-TARS 1.5, Qwen3-VL or GLM-4.1V is read as the same model.

The format of UI-TARS 1.0 is covered by test_inference_replica.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learner_kit import ToyPolicy, build_model, run_episode
from published_model_kit import to_published_format

from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import processor_hash, read_image_sizing, read_vocab_size, suppressed_ids
from deskrl.launch.sizing.model_shape import shape_from_config
from deskrl.learner.batches.packing import pack
from deskrl.learner.policy.policy_model import load_policy, load_processor, make_collator
from deskrl.models.model_checks import check_complete


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_folder_in_the_published_format_is_read_as_the_same_model(architecture: str, tmp_path: Path) -> None:
    folder = build_model(tmp_path, architecture=architecture)
    steps, shots, _ = run_episode(ToyPolicy(folder), "red", seed=0)
    tokenizer = load_processor(folder).tokenizer

    def properties() -> tuple[object, ...]:
        shape = shape_from_config(json.loads((folder / "config.json").read_text()), "tiny")
        return shape, read_image_sizing(folder), read_vocab_size(folder), processor_hash(folder, tokenizer)

    before = properties()
    to_published_format(folder)
    check_complete(folder)
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    # The hash covers every number in the configuration of the image processor, and Qwen3-VL has no `min_pixels` there.
    compared = slice(-1 if architecture == "qwen3_vl" else None)
    assert properties()[compared] == before[compared]

    policy = load_policy(folder, suppressed_ids(tokenizer, read_vocab_size(folder)), freeze_vision=False)
    collator = make_collator(policy, processor, lambda names: {image_hash(shot): shot for shot in shots})
    micro = collator.collate(pack(0, steps, [[0] * len(step.action_ids) for step in steps]))
    with torch.no_grad():
        logprobs_N = policy(micro, 1.0).logprobs_N
    torch.testing.assert_close(logprobs_N, micro.behaviour_logprobs_N, rtol=0, atol=1e-5)
