"""LoRA: an adapter computes, merges, trains, is saved and is resumed as peft does it with transformers' own layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_kit import SHOTS, load, run_in_ranks
from learner_kit import ToyPolicy, build_model
from lora_kit import BOTH, build_padded_model, check_results, sample_rows, train_and_resume
from safetensors.torch import load_file, save_file
from torch import Tensor

from deskrl.core.config import LoraConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner import components
from deskrl.learner.batches.collator import Collator, MicroBatch
from deskrl.learner.batches.packing import Row
from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore
from deskrl.learner.checkpoint.merge_adapter import merge_adapter
from deskrl.learner.policy import activation_checkpointing, lora
from deskrl.learner.policy.fused_layers import AlignedLinear
from deskrl.learner.policy.policy_model import Policy
from deskrl.learner.policy.state_dict_names import checkpoint_tensors
from deskrl.models.model_checks import fingerprint_weights

LANGUAGE = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_padded_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return sample_rows(folder)


def load_adapted(folder: Path, config: LoraConfig) -> tuple[Policy, Collator]:
    """Load a policy with an adapter that has values as after training; the product of a new one's matrices is 0."""
    policy, collator = load(folder)
    policy.add_adapter(config, seed=0)
    assert policy.adapter is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.adapter.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return policy, collator


def save(policy: Policy, target: Path, base: Path) -> Path:
    """Write the adapter of a policy as a checkpoint does."""
    assert policy.adapter is not None
    target.mkdir()
    policy.adapter.save_config(target, base)
    save_file({name: tensor.detach() for name, tensor in policy.adapter.tensors().items()}, target / lora.WEIGHTS)
    return target


def peft_model(folder: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True, autocast_adapter_dtype=False)


def peft_logprobs(toy: ToyPolicy, model: Any, row: Row) -> Tensor:
    """Return logprobs of a row's action tokens, with transformers' own layers and attention."""
    token_ids = torch.tensor([row.token_ids])
    is_image = (token_ids == model.config.image_token_id).int()
    vision = toy._vision_inputs([SHOTS[name] for name in row.images])
    logits = model(input_ids=token_ids, mm_token_type_ids=is_image, **vision).logits[0]
    targets = torch.tensor(row.targets)
    return logits[targets - 1].log_softmax(-1).gather(1, token_ids[0, targets][:, None])[:, 0]


def logprobs(policy: Policy, micro: MicroBatch) -> Tensor:
    with torch.no_grad():
        return policy(micro, 1.0, False).logprobs_N


def test_adapters_on_faster_layers_have_the_loss_and_gradients_of_peft_on_transformers_own(
    folder: Path, rows: list[Row], tmp_path: Path
) -> None:
    policy, collator = load_adapted(folder, BOTH)
    assert policy.adapter is not None
    assert any(isinstance(module, AlignedLinear) for module in policy.modules()), "the test needs padded layers"
    reference = peft_model(folder, save(policy, tmp_path / "adapter", folder))
    loss = -policy(collator.collate(rows), 1.0, False).logprobs_N.sum()
    torch.autograd.backward(loss)
    toy = ToyPolicy(folder)
    expected = -torch.cat([peft_logprobs(toy, reference, row) for row in rows]).sum()
    torch.autograd.backward(expected)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    ours = {name: tensor.grad for name, tensor in policy.adapter.tensors().items()}
    assert ours.keys() == {name.replace(".default.", ".") for name in gradients}
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name.replace(".default.", ".")], gradient, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for name, p in policy.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_weights_are_those_of_merge_and_unload_under_the_names_of_the_model_folder(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    policy, _ = load_adapted(folder, BOTH)
    policy.to(dtype)
    assert policy.adapter is not None
    merged = peft_model(folder, save(policy, tmp_path / "adapter", folder), dtype).merge_and_unload()
    expected = checkpoint_tensors(merged)
    published = {name: policy.adapter.merged(it) for name, it in checkpoint_tensors(policy.model).items()}
    assert list(published) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(published[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learner_computes_with_exactly_the_weights_that_are_published(
    folder: Path, rows: list[Row], dtype: torch.dtype
) -> None:
    policy, collator = load_adapted(folder, BOTH)
    served, _ = load(folder)
    policy.to(dtype)
    served.to(dtype)
    assert policy.adapter is not None
    micro = collator.collate(rows)
    optimizer = torch.optim.AdamW(policy.adapter.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(-policy(micro, 1.0, False).logprobs_N.mean())
        optimizer.step()
        live = checkpoint_tensors(served.model)
        for name, tensor in checkpoint_tensors(policy.model).items():
            live[name].data.copy_(policy.adapter.merged(tensor))
        assert torch.equal(logprobs(policy, micro), logprobs(served, micro))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_does_not_change_the_gradients_of_adapters(
    folder: Path, rows: list[Row], mode: activation_checkpointing.Mode
) -> None:
    gradients = []
    for each in ("off", mode):
        policy, collator = load_adapted(folder, BOTH)
        assert policy.adapter is not None
        for part in (policy.architecture.language_model(policy.model), policy.architecture.vision_tower(policy.model)):
            activation_checkpointing.enable(part, each)
        torch.autograd.backward(policy(collator.collate(rows), 1.0, False).logprobs_N.sum())
        gradients.append({name: tensor.grad for name, tensor in policy.adapter.tensors().items()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_the_initial_policy_scores_while_the_adapter_is_disabled(folder: Path, rows: list[Row]) -> None:
    initial, collator = load(folder)
    policy, _ = load_adapted(folder, BOTH)
    assert policy.adapter is not None
    micro = collator.collate(rows)
    before = logprobs(policy, micro)
    with policy.adapter.disabled():
        torch.testing.assert_close(logprobs(policy, micro), logprobs(initial, micro), rtol=0, atol=0)
    assert not torch.equal(before, logprobs(initial, micro))
    torch.testing.assert_close(logprobs(policy, micro), before, rtol=0, atol=0)
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in policy.adapter.parameters()}


def test_a_new_adapter_depends_on_the_seed_only_and_does_not_change_the_policy(folder: Path, rows: list[Row]) -> None:
    initial, collator = load(folder)
    micro = collator.collate(rows)
    values = []
    for seed in (0, 0, 1):
        policy, _ = load(folder)
        policy.add_adapter(LANGUAGE, seed)
        assert policy.adapter is not None
        torch.testing.assert_close(logprobs(policy, micro), logprobs(initial, micro), rtol=0, atol=0)
        values.append(torch.cat([it.flatten() for it in policy.adapter.tensors().values()]))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_the_learner_adds_the_configured_adapter_and_caches_the_features_of_its_frozen_vision_tower(
    folder: Path,
) -> None:
    learner = {"dtype": "float32", "lora": {"rank": 4}}
    config = RunConfig.model_validate({"model": {"path": folder}, "learner": learner})
    policy = components._load_policy(config, ())
    assert policy.adapter is not None and policy.features is not None
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in policy.adapter.parameters()}


def quantised_copy(folder: Path, target: Path) -> Path:
    """Return a copy of a model folder whose configuration says that its weights are quantised."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    return target


def test_the_learner_rejects_a_quantised_model_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    quantised = quantised_copy(folder, tmp_path / "quantised")
    config = RunConfig.model_validate({"model": {"path": quantised}, "learner": {"lora": {"rank": 4}}})
    with pytest.raises(UserError, match=r"weights quantised by awq cannot be trained, not even by learner\.lora"):
        components.build_components(config, StopEvent())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"targets": ["q_porj"]}, "learner.lora.targets: no linear layer of the model is called q_porj .hint: choose"),
        ({"targets": ["embed_tokens"]}, "is called embed_tokens"),
        ({"vision_targets": ["o_proj"]}, "learner.lora.vision_targets: no linear layer of the model is called o_proj"),
    ],
)
def test_a_target_that_no_layer_has_is_rejected(folder: Path, config: dict[str, Any], expected: str) -> None:
    policy, _ = load(folder)
    with pytest.raises(UserError, match=expected):
        policy.add_adapter(LoraConfig.model_validate({"rank": 4, **config}), seed=0)


def test_two_ranks_save_resume_publish_and_merge_an_adapter_exactly(folder: Path, tmp_path: Path) -> None:
    """With a sharded model and selective activation checkpointing; `tests/long` has the other ZeRO stages."""
    cases = [{"zero_stage": 1}, {"zero_stage": 3, "activation_checkpointing": "selective"}]
    run_in_ranks(train_and_resume, 2, folder, cases, tmp_path)
    whole, sharded = check_results(folder, tmp_path, 2)
    assert sharded == pytest.approx(whole, rel=1e-3)


# Checkpoints of other runs.


def test_the_adapter_of_another_model_is_neither_merged_nor_resumed(folder: Path, tmp_path: Path) -> None:
    policy, _ = load_adapted(folder, LANGUAGE)
    adapter = save(policy, tmp_path / "epoch_1", folder)
    layout = {"learner.lora.rank": 4, "learner.lora.alpha": 8.0}
    record = {"schema": 1, "num_updates": 1, "state": {}, "files": {}}
    (adapter / "learner.json").write_text(
        json.dumps({**record, "layout": CheckpointStore(tmp_path, folder, layout).layout})
    )
    other = build_model(tmp_path / "other", seed=1)
    shutil.copyfile(folder / "config.json", other / "config.json")
    for changed, expected in (
        ({"learner.lora.rank": 8}, "learner.lora.rank = 4, this run has 8"),
        ({"learner.lora.rank": 0}, "learner.lora.rank = 4, this run has 0"),
        ({"learner.lora.alpha": 16.0}, "learner.lora.alpha = 8.0, this run has 16.0"),
    ):
        with pytest.raises(UserError, match=expected):
            CheckpointStore(tmp_path, folder, {**layout, **changed}).newest()
    assert CheckpointStore(tmp_path, folder, layout).newest() is not None
    retrained = shutil.copytree(folder, tmp_path / "retrained")
    tensors = load_file(retrained / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, retrained / "model.safetensors")
    assert fingerprint_weights(retrained) != fingerprint_weights(folder)
    with pytest.raises(UserError, match=r"its adapter belongs to another model than .*retrained"):
        CheckpointStore(tmp_path, retrained, layout).newest()
    with pytest.raises(UserError, match=r"the adapter belongs to another model than .*retrained"):
        merge_adapter(adapter, tmp_path / "merged", retrained)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_rejected(folder: Path, tmp_path: Path) -> None:
    policy, _ = load_adapted(folder, LANGUAGE)
    adapter = save(policy, tmp_path / "adapter", tmp_path / "nowhere")
    quantised = quantised_copy(folder, tmp_path / "quantised")
    for arguments, expected in (
        ((folder, tmp_path / "merged"), "contains no adapter"),
        ((adapter, folder, folder), "exists already"),
        ((adapter, tmp_path / "merged"), "its model .*nowhere is not on this machine"),
        ((adapter, tmp_path / "merged", quantised), "quantised: an adapter cannot be merged into weights .* by awq"),
    ):
        with pytest.raises(UserError, match=expected):
            merge_adapter(*arguments)


def without_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / lora.WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / lora.WEIGHTS)


def of_a_wider_model(adapter: Path) -> None:
    tensors = load_file(adapter / lora.WEIGHTS)
    save_file({name: torch.cat([it, it], dim=1) for name, it in tensors.items()}, adapter / lora.WEIGHTS)


def truncated(adapter: Path) -> None:
    (adapter / lora.WEIGHTS).write_bytes((adapter / lora.WEIGHTS).read_bytes()[:-100])


def without_its_configuration(adapter: Path) -> None:
    (adapter / lora.CONFIG).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_a_tensor, "has no counterpart .hint: give the adapter's own model with --base, or copy"),
        (of_a_wider_model, "does not fit the model .*size mismatch"),
        (truncated, "does not fit the model .*incomplete metadata"),
        (without_its_configuration, "contains no adapter .adapter_config.json is missing"),
    ],
)
def test_an_adapter_that_is_damaged_or_of_another_base_is_rejected_and_leaves_nothing(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    policy, _ = load_adapted(folder, LANGUAGE)
    adapter = save(policy, tmp_path / "adapter", folder)
    damage(adapter)
    with pytest.raises(UserError, match=expected):
        merge_adapter(adapter, tmp_path / "merged", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
