"""Policy forward pass on a GPU in bfloat16: results agree with float32 on a CPU to the precision of bfloat16.

Covers variable-length attention (forward and backward), logprobs, and optimizer steps under every mode of activation
checkpointing, offload and ZeRO.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_kit import ToyPolicy, build_model, run_episode

from deskrl.core.config import LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import read_vocab_size, suppressed_ids
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import activation_checkpointing, varlen_attention
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor, make_collator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU available"),
]


@pytest.mark.parametrize("each", [(3, 200, 64, 1), (1500, 700)], ids=["short", "long"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dimension", [64, 72, 80, 128])
def test_attention_over_concatenated_sequences_agrees_with_the_cpu(
    causal: bool, dimension: int, each: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, heads, sum(each), dimension) for heads in (4, 2, 2)]
    module: Any = torch.nn.Module()
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        query, key, value = (part.detach().to(device, dtype, copy=True).requires_grad_() for part in parts)
        arguments = varlen_attention.make_lengths(each, torch.device(device)).as_arguments()
        output, _ = varlen_attention.attend(
            module, query, key, value, None, scaling=dimension**-0.5, is_causal=causal, **arguments
        )
        (output.float() ** 2).sum().backward()
        gradients = [part.grad for part in (query, key, value) if part.grad is not None]
        results.append([tensor.detach().float().cpu() for tensor in (output, *gradients)])
    for expected, found in zip(*results, strict=True):
        assert float((expected - found).abs().max()) < 0.03 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "glm4v"])
def material(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row], Mapping[str, bytes]]:
    """Tiny model of each architecture, rows of sampled episodes, and screenshots by hash."""
    folder = build_model(tmp_path_factory.mktemp("model"), architecture=request.param)
    toy = ToyPolicy(folder)
    rows: list[Row] = []
    shots: dict[str, bytes] = {}
    for index, task_id in enumerate(["red", "green", "blue"]):
        steps, seen, _ = run_episode(toy, task_id, index)
        rows += pack(index, steps, [[0] * len(step.action_ids) for step in steps])
        shots |= {image_hash(shot): shot for shot in seen}
    return folder, rows, shots


def load(
    material: tuple[Path, list[Row], Mapping[str, bytes]], config: LearnerConfig
) -> tuple[Policy, MicroBatchLoader]:
    folder, _, shots = material
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, read_vocab_size(folder))
    dtype = getattr(torch, config.dtype)
    policy = load_policy(folder, suppressed, config.freeze_vision, dtype, config.feature_cache_bytes)
    activation_checkpointing.enable(policy.model.model.language_model, config.activation_checkpointing)
    collator = make_collator(policy, processor, lambda names: {name: shots[name] for name in names})
    return policy, MicroBatchLoader(collator, 0, 1, 1024, lambda: None)


def test_logprobs_of_sampled_tokens_agree_with_those_from_the_cpu(
    material: tuple[Path, list[Row], Mapping[str, bytes]],
) -> None:
    policy, loader = load(material, LearnerConfig(freeze_vision=True))
    (micro,) = loader.load([material[1]])
    with torch.no_grad():
        logprobs_N = policy.cuda()(micro.to(torch.device("cuda")), 1.0).logprobs_N.cpu()
    difference_N = (logprobs_N - micro.behaviour_logprobs_N).abs()
    assert float(difference_N.mean()) < 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1, "freeze_vision": True, "activation_checkpointing": "selective"},
        {"zero_stage": 1, "activation_checkpointing": "full"},
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3},
        {"zero_stage": 1, "dtype": "float16"},
    ],
    ids=str,
)
def test_imitation_lowers_the_loss(
    material: tuple[Path, list[Row], Mapping[str, bytes]], settings: dict[str, Any]
) -> None:
    config = LearnerConfig.model_validate({"grpo": {"learning_rate": 1e-3}} | settings)
    policy, loader = load(material, config)
    engine = DeepSpeedEngine(policy, config)

    def take_step() -> tuple[bool, float]:
        loss = 0.0
        with engine.accumulate_gradients(len(shard)):
            for micro in loader.load(shard):
                part = imitation_loss(engine.forward(micro, temperature=1.0).logprobs_N, 10.0)
                engine.backward(part)
                loss += float(part.detach())
        return engine.step().applied, loss

    losses: list[float] = []
    shard = loader.shard(material[1])
    while len(losses) < 4:
        applied, loss = take_step()
        assert applied or engine.scales_loss
        losses += [loss] if applied else []
    assert losses[-1] < losses[0]
    assert all(tensor.isfinite().all() for tensor in engine.weights().values())
