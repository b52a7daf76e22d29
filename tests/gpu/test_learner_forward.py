"""On a GPU in bfloat16: what the kernels there make is what float32 makes on a CPU, to the precision of bfloat16.

Attention over sequences end to end, forward and backward; a policy's logprobs; an optimizer step under every way of
keeping activations and optimizer states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_kit import ToyPolicy, build_model, play

from deskrl.core.config import LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.rendering import suppressed_ids, vocab_size_of
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import activations, attention
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import Policy, Scores, load_policy, load_processor, make_collator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("each", [(3, 200, 64, 1), (1500, 700)], ids=["short", "long"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dimension", [64, 80, 128])
def test_attention_over_sequences_that_lie_end_to_end(causal: bool, dimension: int, each: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, heads, sum(each), dimension) for heads in (4, 2, 2)]
    module: Any = torch.nn.Module()
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        query, key, value = (part.detach().to(device, dtype, copy=True).requires_grad_() for part in parts)
        arguments = attention.lengths_of(each, torch.device(device)).as_arguments()
        output, _ = attention.attend(
            module, query, key, value, None, scaling=dimension**-0.5, is_causal=causal, **arguments
        )
        (output.float() ** 2).sum().backward()
        gradients = [part.grad for part in (query, key, value) if part.grad is not None]
        results.append([tensor.detach().float().cpu() for tensor in (output, *gradients)])
    for expected, found in zip(*results, strict=True):
        assert float((expected - found).abs().max()) < 0.03 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], Mapping[str, bytes]]:
    """A tiny model, rows of sampled episodes, and their screenshots."""
    folder = build_model(tmp_path_factory.mktemp("model"))
    toy = ToyPolicy(folder)
    rows: list[Row] = []
    shots: dict[str, bytes] = {}
    for index, task_id in enumerate(["red", "green", "blue"]):
        steps, seen, _ = play(toy, task_id, index)
        rows += pack(index, steps, [[0] * len(step.action_ids) for step in steps])
        shots |= {image_hash(shot): shot for shot in seen}
    return folder, rows, shots


def load(material: tuple[Path, list[Row], Mapping[str, bytes]], config: LearnerConfig) -> tuple[Policy, Feed]:
    folder, _, shots = material
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, vocab_size_of(folder))
    dtype = getattr(torch, config.dtype)
    policy = load_policy(folder, suppressed, config.freeze_vision, dtype, config.feature_cache_bytes)
    activations.keep(policy.model.model.language_model, config.activations)
    collator = make_collator(policy, processor, lambda names: {name: shots[name] for name in names})
    return policy, Feed(collator, 0, 1, 1024, lambda: None)


def test_a_policy_gives_its_tokens_the_logprobs_that_a_cpu_gives_them(
    material: tuple[Path, list[Row], Mapping[str, bytes]],
) -> None:
    policy, feed = load(material, LearnerConfig(freeze_vision=True))
    (micro,) = feed.batches([material[1]])
    with torch.no_grad():
        logprobs_N = policy.cuda()(micro.to(torch.device("cuda")), 1.0).logprobs_N.cpu()
    difference_N = (logprobs_N - micro.behaviour_logprobs_N).abs()
    assert float(difference_N.mean()) < 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1, "freeze_vision": True, "activations": "attention"},
        {"zero_stage": 1, "activations": "layers"},
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3},
        {"zero_stage": 1, "dtype": "float16"},
    ],
    ids=str,
)
def test_imitation_makes_what_it_imitates_likelier(
    material: tuple[Path, list[Row], Mapping[str, bytes]], settings: dict[str, Any]
) -> None:
    config = LearnerConfig.model_validate({"grpo": {"learning_rate": 1e-3}} | settings)
    policy, feed = load(material, config)
    engine = Engine(policy, config)

    def loss_of(index: int, micro: MicroBatch, scores: Scores) -> torch.Tensor:
        losses.append(float(imitation_loss(scores.logprobs_N.detach(), 10.0)))
        return imitation_loss(scores.logprobs_N, 10.0)

    totals = []
    for _ in range(4):
        losses: list[float] = []
        share = feed.share(material[1])
        while not engine.update(feed.batches(share), len(share), 1.0, loss_of).applied:
            assert engine.scales_loss
            losses.clear()
        totals.append(sum(losses))
    assert totals[-1] < totals[0]
    assert all(tensor.isfinite().all() for tensor in engine.weights().values())
