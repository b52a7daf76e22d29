"""A folder as UI-TARS 1.5 was published, before the transformers that loads it: nothing of it is misread.

UI-TARS 1.0's is served by a replica in test_inference_replica.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from learner_kit import ToyPolicy, build_model, play
from published_kit import as_published

from deskrl.core.explain.shape import shape_of_config
from deskrl.core.ids import image_hash
from deskrl.core.model_folder import refuse_incomplete
from deskrl.core.rendering import image_sizing_of, processor_hash, suppressed_ids, vocab_size_of
from deskrl.learner.batches.packing import pack
from deskrl.learner.policy.model import load_policy, load_processor, make_collator


def test_the_published_form_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    steps, shots, _ = play(ToyPolicy(folder), "red", seed=0)
    tokenizer = load_processor(folder).tokenizer

    def known() -> tuple[object, ...]:
        shape = shape_of_config(json.loads((folder / "config.json").read_text()), "tiny")
        return shape, image_sizing_of(folder), vocab_size_of(folder), processor_hash(folder, tokenizer)

    before = known()
    as_published(folder)
    refuse_incomplete(folder)
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    assert known() == before

    policy = load_policy(folder, suppressed_ids(tokenizer, vocab_size_of(folder)), freeze_vision=False)
    collator = make_collator(policy, processor, lambda names: {image_hash(shot): shot for shot in shots})
    micro = collator.collate(pack(0, steps, [[0] * len(step.action_ids) for step in steps]))
    with torch.no_grad():
        logprobs_N = policy(micro, 1.0).logprobs_N
    torch.testing.assert_close(logprobs_N, micro.behaviour_logprobs_N, rtol=0, atol=1e-5)
