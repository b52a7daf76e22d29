"""The learner's forward pass against transformers' own, one step at a time: the same loss, the same gradients.

In float32 on a CPU, positions of text and screenshots included, however rows are shared, laid end to end and kept.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from learner_kit import ToyPolicy, build_model, play
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deskrl.core.families import Architecture
from deskrl.core.ids import image_hash
from deskrl.core.rendering import image_token_id, suppressed_ids, vocab_size_of
from deskrl.core.trajectory import Step
from deskrl.learner.batches.batch import Collator, MicroBatch
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import activations, attention, fused
from deskrl.learner.policy import model as learner_model
from deskrl.learner.policy.model import Policy, load_policy, load_processor, make_collator

TEMPERATURE = 0.7
DENOMINATOR = 10.0


class Material:
    """A model, three sampled episodes of three steps, and what transformers makes of them."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = build_model(folder, architecture=architecture)
        toy = ToyPolicy(folder)
        played = [play(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "red"])]
        self.steps: list[list[Step]] = [steps for steps, _, _ in played]
        self.shots = {image_hash(shot): shot for _, shots, _ in played for shot in shots}
        self.processor = load_processor(folder)
        self.suppressed = suppressed_ids(self.processor.tokenizer, vocab_size_of(folder))
        self.loss, self.gradients = self._reference()

    def rows(self, share: bool = True) -> list[Row]:
        """Shared by the steps of an episode, or one for each step."""
        return [
            row
            for index, steps in enumerate(self.steps)
            for row in pack(index, steps, [[0] * len(step.action_ids) for step in steps], share)
        ]

    def load(self, freeze_vision: bool = False) -> tuple[Policy, Collator]:
        """The policy anew, with a collator."""
        policy = load_policy(self.folder, self.suppressed, freeze_vision, feature_cache_bytes=10**8)
        return policy, make_collator(policy, self.processor, lambda names: {name: self.shots[name] for name in names})

    def _reference(self) -> tuple[float, dict[str, Tensor]]:
        """Step by step, with transformers' own forward pass, attention, positions and logits everywhere."""
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        total = 0.0
        for step in (step for steps in self.steps for step in steps):
            ids = torch.tensor([[*step.prompt_ids, *step.action_ids]])
            pictures = [Image.open(io.BytesIO(self.shots[name])).convert("RGB") for name in step.images]
            vision = self.processor.image_processor(images=pictures, return_tensors="pt")
            is_image = (ids == image_token_id(self.processor.tokenizer)).int()
            logits = model(input_ids=ids, mm_token_type_ids=is_image, **vision).logits[0] / TEMPERATURE
            logits[:, list(self.suppressed)] = float("-inf")
            start = len(step.prompt_ids)
            logprobs = logits.log_softmax(-1)[start - 1 : -1].gather(1, torch.tensor(step.action_ids)[:, None])
            loss = -logprobs.sum() / DENOMINATOR
            loss.backward()
            total += float(loss.detach())
        return total, {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=get_args(Architecture))
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("model"), request.param)


def learn(policy: Policy, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a pass over micro-batches."""
    policy.zero_grad()
    total = 0.0
    for micro in batches:
        loss = imitation_loss(policy(micro, TEMPERATURE).logprobs_N, DENOMINATOR)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(material: Material, outcome: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = outcome
    assert loss == pytest.approx(material.loss, rel=1e-6)
    expected = {name: value for name, value in material.gradients.items() if name in gradients}
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("share", [True, False])
def test_rows_laid_end_to_end_learn_what_steps_learn_one_at_a_time(material: Material, share: bool) -> None:
    policy, collator = material.load()
    rows = material.rows(share)
    assert len(rows) == (3 if share else 9)
    outcome = learn(policy, [collator.collate(rows)])
    assert len(outcome[1]) == len(material.gradients)
    assert_same(material, outcome)


def test_several_micro_batches_learn_what_one_learns(material: Material) -> None:
    policy, collator = material.load()
    rows = material.rows()
    assert_same(material, learn(policy, [collator.collate(rows[:1]), collator.collate(rows[1:])]))


@pytest.mark.parametrize("kept", ["attention", "layers"])
def test_what_is_computed_anew_is_the_same(material: Material, kept: activations.Kept) -> None:
    policy, collator = material.load()
    activations.keep(policy.model.model.language_model, kept)
    activations.keep(policy.model.model.visual, kept)
    assert_same(material, learn(policy, [collator.collate(material.rows())]))


class CountAttention(TorchDispatchMode):
    """Counts how often attention is really computed."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func in attention.OPERATORS
        return func(*args, **kwargs or {})


def test_attention_is_not_computed_anew_where_its_results_are_kept(material: Material) -> None:
    num_calls = {}
    kept: activations.Kept
    for kept in ("all", "attention", "layers"):
        policy, collator = material.load(freeze_vision=True)
        activations.keep(policy.model.model.language_model, kept)
        with CountAttention() as count:
            learn(policy, [collator.collate(material.rows())])
        num_calls[kept] = count.num_calls
    num_layers, num_rows = 4, 3
    assert num_calls["attention"] == num_calls["all"]
    assert num_calls["layers"] == num_calls["all"] + num_layers * num_rows


def test_logits_may_be_made_a_few_tokens_at_a_time(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_model, "_TOKENS_AT_ONCE", 4)
    policy, collator = material.load()
    assert_same(material, learn(policy, [collator.collate(material.rows())]))


def test_a_row_that_nothing_is_learnt_from_has_no_gradient_and_no_error(material: Material) -> None:
    policy, collator = material.load()
    row = material.rows()[0]
    silent = Row(row.trajectory, row.token_ids, row.images, (), (), ())
    loss, gradients = learn(policy, [collator.collate([silent])])
    assert loss == 0.0
    assert all(not value.any() for value in gradients.values())


def test_a_screenshot_goes_through_a_frozen_tower_once_and_the_language_model_learns_the_same(
    material: Material,
) -> None:
    policy, collator = material.load(freeze_vision=True)
    seen: list[int] = []
    policy.model.model.visual.register_forward_hook(
        lambda module, arguments, named, output: seen.append(len(named["grid_thw"])), with_kwargs=True
    )
    for _ in range(2):
        assert_same(material, learn(policy, [collator.collate([row]) for row in material.rows()]))
    assert sum(seen) == len(material.shots)


def test_a_tower_that_learns_sees_every_screenshot_of_every_micro_batch(material: Material) -> None:
    policy, collator = material.load()
    assert policy.features is None
    micro = collator.collate(material.rows())
    assert len(micro.images) == len(material.shots)
    assert all(image.features is None for image in micro.images)


def test_attention_stays_within_its_sequence_and_looks_back_only() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 7, 8)
    key, value = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    lengths = attention.lengths_of((3, 4), torch.device("cpu"))
    module: Any = torch.nn.Module()
    module.is_causal = True
    output, _ = attention.attend(module, query, key, value, None, scaling=0.5, **lengths.as_arguments())

    allowed = torch.zeros(7, 7, dtype=torch.bool)
    allowed[:3, :3] = torch.ones(3, 3).tril().bool()
    allowed[3:, 3:] = torch.ones(4, 4).tril().bool()
    repeated = [part.repeat_interleave(2, dim=1) for part in (key, value)]
    scores = (query @ repeated[0].transpose(2, 3) * 0.5).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(output, (scores.softmax(-1) @ repeated[1]).transpose(1, 2))


def test_a_gated_layer_of_an_odd_width_computes_at_a_rounder_one_and_learns_the_same() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

    torch.manual_seed(0)
    mlp: Any = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=16, intermediate_size=100, hidden_act="silu"), bias=True)
    hidden = torch.randn(5, 16)

    def learn_once() -> dict[str, Tensor]:
        mlp.zero_grad()
        output = mlp(hidden)
        (output**2).sum().backward()
        return {"output": output.detach()} | {name: p.grad.clone() for name, p in mlp.named_parameters()}

    expected = learn_once()
    fused.align(mlp)
    assert mlp.gate_proj(hidden).shape == (5, 128)
    found = learn_once()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
