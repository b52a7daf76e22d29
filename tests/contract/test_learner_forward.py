"""Policy forward pass: loss and gradients equal those of transformers' own forward pass over one step at a time.

Computed in float32 on a CPU with one architecture; `test_testing_architectures.py` compares all of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learner_kit import ToyPolicy, build_model, run_episode
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import image_token_id, read_vocab_size, suppressed_ids
from deskrl.core.step_codec import Step
from deskrl.learner.batches.collator import Collator, MicroBatch
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import activation_checkpointing, fused_layers, varlen_attention
from deskrl.learner.policy import policy_model as learner_model
from deskrl.learner.policy.architectures.qwen2_vl import Qwen25VLLearner
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor, make_collator

TEMPERATURE = 0.7
DENOMINATOR = 10.0


class Material:
    """Model, three sampled episodes of three steps, and transformers' loss and gradients for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = build_model(folder)
        toy = ToyPolicy(folder)
        episodes = [run_episode(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "red"])]
        self.steps: list[list[Step]] = [steps for steps, _, _ in episodes]
        self.shots = {image_hash(shot): shot for _, shots, _ in episodes for shot in shots}
        self.processor = load_processor(folder)
        self.suppressed = suppressed_ids(self.processor.tokenizer, read_vocab_size(folder))
        self.loss, self.gradients = self._reference()

    def rows(self, share: bool = True) -> list[Row]:
        """Return one row per episode if `share` is True, otherwise one per step."""
        return [
            row
            for index, steps in enumerate(self.steps)
            for row in pack(index, steps, [[0] * len(step.action_ids) for step in steps], share)
        ]

    def load(self, freeze_vision: bool = False) -> tuple[Policy, Collator]:
        """Load the policy and its collator."""
        policy = load_policy(self.folder, self.suppressed, freeze_vision, feature_cache_bytes=10**8)
        return policy, make_collator(policy, self.processor, lambda names: {name: self.shots[name] for name in names})

    def _reference(self) -> tuple[float, dict[str, Tensor]]:
        """Compute loss and gradients per step with transformers' own forward pass and logits at all positions."""
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        total = 0.0
        for step in (step for steps in self.steps for step in steps):
            ids = torch.tensor([[*step.prompt_ids, *step.action_ids]])
            images = [Image.open(io.BytesIO(self.shots[name])).convert("RGB") for name in step.images]
            vision = self.processor.image_processor(images=images, return_tensors="pt")
            is_image = (ids == image_token_id(self.processor.tokenizer)).int()
            logits = model(input_ids=ids, mm_token_type_ids=is_image, **vision).logits[0] / TEMPERATURE
            logits[:, list(self.suppressed)] = float("-inf")
            start = len(step.prompt_ids)
            logprobs = logits.log_softmax(-1)[start - 1 : -1].gather(1, torch.tensor(step.action_ids)[:, None])
            loss = -logprobs.sum() / DENOMINATOR
            loss.backward()
            total += float(loss.detach())
        return total, {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("model"))


def loss_and_gradients(policy: Policy, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a pass over micro-batches."""
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
def test_concatenated_rows_give_the_loss_and_gradients_of_single_steps(material: Material, share: bool) -> None:
    policy, collator = material.load()
    rows = material.rows(share)
    assert len(rows) == (3 if share else 9)
    outcome = loss_and_gradients(policy, [collator.collate(rows)])
    assert len(outcome[1]) == len(material.gradients)
    assert_same(material, outcome)


class CountAttention(TorchDispatchMode):
    """Counts the executions of attention operators."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func in varlen_attention.OPERATORS
        return func(*args, **kwargs or {})


def test_selective_checkpointing_does_not_recompute_attention(material: Material) -> None:
    num_calls = {}
    mode: activation_checkpointing.Mode
    for mode in ("off", "selective", "full"):
        policy, collator = material.load(freeze_vision=True)
        activation_checkpointing.enable(policy.architecture.language_model(policy.model), mode)
        with CountAttention() as count:
            loss_and_gradients(policy, [collator.collate(material.rows())])
        num_calls[mode] = count.num_calls
    num_layers, num_rows = 4, 3
    assert num_calls["selective"] == num_calls["off"]
    assert num_calls["full"] == num_calls["off"] + num_layers * num_rows


def test_logits_can_be_computed_for_a_few_tokens_at_a_time(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_model, "_TOKENS_AT_ONCE", 4)
    policy, collator = material.load()
    assert_same(material, loss_and_gradients(policy, [collator.collate(material.rows())]))


def test_a_row_without_action_tokens_has_zero_loss_and_gradient(material: Material) -> None:
    policy, collator = material.load()
    row = material.rows()[0]
    without_targets = Row(row.trajectory, row.token_ids, row.images, (), (), ())
    loss, gradients = loss_and_gradients(policy, [collator.collate([without_targets])])
    assert loss == 0.0
    assert all(not value.any() for value in gradients.values())


def test_a_trained_vision_tower_encodes_every_screenshot_of_every_micro_batch(material: Material) -> None:
    policy, collator = material.load()
    assert policy.features is None
    micro = collator.collate(material.rows())
    assert len(micro.images) == len(material.shots)
    assert all(image.features is None for image in micro.images)


def test_attention_is_causal_and_limited_to_its_sequence() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 7, 8)
    key, value = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    lengths = varlen_attention.make_lengths((3, 4), torch.device("cpu"))
    module: Any = torch.nn.Module()
    module.is_causal = True
    output, _ = varlen_attention.attend(module, query, key, value, None, scaling=0.5, **lengths.as_arguments())

    allowed = torch.zeros(7, 7, dtype=torch.bool)
    allowed[:3, :3] = torch.ones(3, 3).tril().bool()
    allowed[3:, 3:] = torch.ones(4, 4).tril().bool()
    repeated = [part.repeat_interleave(2, dim=1) for part in (key, value)]
    scores = (query @ repeated[0].transpose(2, 3) * 0.5).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(output, (scores.softmax(-1) @ repeated[1]).transpose(1, 2))


def test_a_gated_mlp_padded_to_an_aligned_width_gives_the_same_output_and_gradients() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

    torch.manual_seed(0)
    mlp: Any = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=16, intermediate_size=100, hidden_act="silu"), bias=True)
    hidden = torch.randn(5, 16)

    def output_and_gradients() -> dict[str, Tensor]:
        mlp.zero_grad()
        output = mlp(hidden)
        (output**2).sum().backward()
        return {"output": output.detach()} | {name: p.grad.clone() for name, p in mlp.named_parameters()}

    expected = output_and_gradients()
    fused_layers.pad_mlp(mlp)
    assert mlp.gate_proj(hidden).shape == (5, 128)
    found = output_and_gradients()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_with_the_bias_of_the_convolution_if_it_has_one(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=bias)
    patches = torch.randn(5, 3, 2, 4, 4)
    expected = convolution(patches).view(5, 8)
    patch_embed: Any = torch.nn.Module()
    patch_embed.proj = convolution
    names = list(patch_embed.state_dict())
    fused_layers.project_patches(patch_embed)
    assert list(patch_embed.state_dict()) == names
    torch.testing.assert_close(patch_embed.proj(patches), expected)


class _DropsANorm(Qwen25VLLearner):
    def install(self, model: Any) -> None:
        model.model.language_model.norm = torch.nn.Identity()


def test_an_architecture_that_drops_a_parameter_is_rejected(material: Material) -> None:
    model = material.load()[0].model
    with pytest.raises(
        UserError, match=r"install of _DropsANorm adds or drops 1 parameters, such as model\.language_mo"
    ):
        Policy(model, (), architecture=_DropsANorm())


def test_an_architecture_that_transformers_lacks_is_rejected(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen25VLLearner, "model_type", "qwen9_vl")
    with pytest.raises(UserError, match=r"transformers \S+ has no models of the type qwen9_vl .hint: install a later"):
        load_policy(material.folder, (), freeze_vision=False)
    with pytest.raises(UserError, match="has no models of the type qwen9_vl"):
        build_model(material.folder.parent / "new")
