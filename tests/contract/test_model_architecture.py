"""Tensors derived from a config.json: they are those of transformers' own model, by name and shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_kit import build_model
from model_folder_kit import TINY, UI_TARS_7B, model_config, rename_saved_by_transformers
from safetensors.torch import load_file, save_file

from deskrl.core.errors import UserError
from deskrl.inference.weight_staging import checkpoint_shapes
from deskrl.learner.policy.policy_model import load_policy
from deskrl.learner.policy.state_dict_names import checkpoint_tensors, unsharded_shape
from deskrl.models.architectures import ConfigError, load_architecture
from deskrl.models.model_checks import check_complete


def transformers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that transformers saves for a config.json, without allocating weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    return {name: unsharded_shape(tensor) for name, tensor in checkpoint_tensors(model).items()}


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("text", [TINY, UI_TARS_7B])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_nested", [True, False])
def test_the_tensors_of_a_configuration_are_those_of_transformers(
    architecture: str, text: dict[str, int], is_tied: bool, is_nested: bool
) -> None:
    config = model_config(architecture, text) | {"tie_word_embeddings": is_tied}
    if is_nested:
        names = [*text, "vocab_size", "num_key_value_heads", "tie_word_embeddings"]
        config["text_config"] = {name: config.pop(name) for name in names if name in config}
        config["tie_word_embeddings"] = is_tied
    assert load_architecture(architecture).layout(config).tensors == transformers_shapes(config)


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
def test_sizes_that_a_configuration_leaves_out_are_those_of_transformers(architecture: str) -> None:
    """The vision_config of UI-TARS 1.0 has four keys."""
    config = model_config(architecture, {**UI_TARS_7B, "num_hidden_layers": 1})
    config["vision_config"] = {"in_chans": 3, "spatial_patch_size": 14}
    layout = load_architecture(architecture).layout
    assert layout(config).tensors == transformers_shapes(config)
    assert layout(config).token_ids == layout(config | {"bos_token_id": 1}).token_ids


@pytest.mark.parametrize(
    ("change_text", "change_vision"),
    [
        ({}, {}),
        ({"attention_bias": True}, {}),
        ({"head_dim": 32}, {"temporal_patch_size": 1, "patch_size": 28}),
        ({}, {"deepstack_visual_indexes": []}),
    ],
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_tensors_of_a_qwen3_vl_are_those_of_transformers(
    change_text: dict[str, Any], change_vision: dict[str, Any], is_tied: bool
) -> None:
    config = model_config("qwen3_vl") | {"tie_word_embeddings": is_tied}
    config["text_config"] |= change_text
    config["vision_config"] |= change_vision
    assert load_architecture("qwen3_vl").layout(config).tensors == published_names(transformers_shapes(config))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("change_vision", [{}, {"attention_bias": True, "temporal_patch_size": 1, "image_size": 70}])
def test_the_tensors_of_a_glm4v_are_those_of_transformers(is_tied: bool, change_vision: dict[str, Any]) -> None:
    config = model_config("glm4v") | {"tie_word_embeddings": is_tied}
    config["vision_config"] |= change_vision
    assert load_architecture("glm4v").layout(config).tensors == published_names(transformers_shapes(config))


@pytest.mark.parametrize(
    ("architecture", "size"), [("qwen3_vl", "2b"), ("qwen3_vl", "4b"), ("qwen3_vl", "8b"), ("glm4v", "9b")]
)
def test_the_tensors_of_a_published_size_are_those_of_transformers(architecture: str, size: str) -> None:
    published = load_architecture(architecture)
    config = {**published.published[size], "model_type": architecture}
    assert published.layout(config).tensors == published_names(transformers_shapes(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_hidden_size": 65}, "the vision tower's output has 65 features, but hidden_size is 64"),
        ({"num_position_embeddings": 10}, "vision_config.num_position_embeddings = 10 is not a square"),
        ({"deepstack_visual_indexes": [0, 3]}, "deepstack_visual_indexes is not a list of different numbers below 3"),
        ({"deepstack_visual_indexes": [1, 1]}, "deepstack_visual_indexes is not a list of different numbers below 3"),
        ({"deepstack_visual_indexes": 2}, "deepstack_visual_indexes is not a list of different numbers below 3"),
    ],
)
def test_sizes_of_a_qwen3_vl_that_contradict_each_other_are_rejected(change: dict[str, Any], message: str) -> None:
    config = model_config("qwen3_vl")
    config["vision_config"] |= change
    with pytest.raises(ConfigError, match=message):
        load_architecture("qwen3_vl").layout(config)


def test_a_glm4v_without_the_key_by_which_vllm_loads_its_biases_is_rejected() -> None:
    config = model_config("glm4v")
    del config["text_config"]["attention_bias"]
    with pytest.raises(ConfigError, match="attention_bias is not true, but queries, keys and values have biases"):
        load_architecture("glm4v").layout(config)


def published_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors by their names in `TensorLayout`."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): shape
        for name, shape in shapes.items()
    }


def change_weights(folder: Path, change: Any) -> None:
    """Replace the tensors of a folder."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_folder_with_names_of_transformers_is_loaded_and_announced_as_it_is(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    before = load_policy(folder, (), freeze_vision=False).state_dict()
    change_weights(folder, lambda held: {rename_saved_by_transformers(name): it for name, it in held.items()})
    check_complete(folder)
    policy = load_policy(folder, (), freeze_vision=False)
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint_tensors(policy.model).keys() == checkpoint_shapes(folder).keys()


def test_a_copy_of_a_tied_embedding_is_not_a_tensor_of_the_model(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    change_weights(folder, lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    check_complete(folder)
    policy = load_policy(folder, (), freeze_vision=False)
    assert checkpoint_tensors(policy.model).keys() == checkpoint_shapes(folder).keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {name: it for name, it in held.items() if "layers.1.mlp" not in name},
        lambda held: {f"module.{name}": it for name, it in held.items()},
        lambda held: held | {"model.norm.weight": torch.ones(7)},
    ],
)
def test_the_learner_fills_no_tensor_at_random(tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(build_model(tmp_path / "built"), folder)
    change_weights(folder, change)
    with pytest.raises(UserError):
        load_policy(folder, (), freeze_vision=False)
    monkeypatch.setattr("deskrl.learner.policy.policy_model.check_complete", lambda *_: None)
    with pytest.raises(UserError, match=r"tensors of the model are missing|cannot load the model"):
        load_policy(folder, (), freeze_vision=False)
