"""An offloaded reference policy occupies the GPU only while it scores tokens, with the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_kit import load, make_rows
from learner_kit import ToyPolicy, build_model, run_episode

from deskrl.core.config import LearnerConfig
from deskrl.learner.policy.reference_policy import FrozenReference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU available"),
]


def test_an_offloaded_reference_gives_the_same_logprobs_and_returns_the_memory(tmp_path: Path) -> None:
    folder, device = build_model(tmp_path / "model"), torch.device("cuda")
    rows = make_rows([run_episode(ToyPolicy(folder), "red", 0)])
    results, held = [], []
    for offload in (False, True):
        policy, collator = load(folder)
        config = LearnerConfig(dtype="float32", offload_reference=offload)
        before = torch.cuda.memory_allocated()
        reference = FrozenReference(policy, config, device)
        results.append([reference.logprobs([collator.collate(rows)], 1.0)[0] for _ in range(2)])
        held.append(torch.cuda.memory_allocated() - before)
        del reference, policy
    assert all(result.equal(results[0][0]) for pair in results for result in pair)
    assert held[1] < held[0] / 4
