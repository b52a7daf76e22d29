"""Check of a model folder: which folders are accepted, and the line that rejects the others."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_folder_kit import (
    TEMPLATE,
    UI_TARS_7B,
    Tensors,
    change_weights,
    edit_json,
    model_config,
    rename_saved_by_transformers,
    without,
    write_json,
    write_model_folder,
    write_safetensors,
)

from deskrl.core.errors import UserError
from deskrl.models.model_checks import check_complete

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4877660776\n"


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def retyped(name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: (dtype, shape or tensors[name][1])}


def reject(folder: Path, message: str) -> UserError:
    """Check that a folder is rejected in one line that contains a message; return the error."""
    with pytest.raises(UserError) as rejected:
        check_complete(folder)
    line = str(rejected.value)
    assert re.search(message, line), line
    assert "\n" not in line and str(folder) in line
    return rejected.value


# Accepted folders.


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_folder_of_a_published_model_is_accepted(tmp_path: Path, architecture: str, num_shards: int) -> None:
    check_complete(write_model_folder(tmp_path, architecture, num_shards=num_shards))


def test_a_nested_configuration_with_a_separate_template_is_accepted(tmp_path: Path) -> None:
    config = model_config("qwen2_5_vl")
    inner = {key: config.pop(key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    write_model_folder(tmp_path)
    write_json(tmp_path / "config.json", {**config, "text_config": inner})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "special": True}})
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    check_complete(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        renamed(rename_saved_by_transformers),
        renamed(lambda name: rename_saved_by_transformers(name) if name.startswith("visual.") else name),
        retyped(Q_PROJ, "F32"),
        retyped(Q_PROJ, "F16"),
    ],
)
def test_names_and_types_that_both_engines_load_are_accepted(
    tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    change_weights(write_model_folder(tmp_path), change)
    check_complete(tmp_path)


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_embeddings_need_no_head(tmp_path: Path, has_head: bool) -> None:
    write_model_folder(tmp_path)
    if not has_head:
        change_weights(tmp_path, lambda tensors: without(tensors, [HEAD]))
        reject(tmp_path, rf"tensor {HEAD} is missing.*hint: .*tie_word_embeddings")
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    check_complete(tmp_path)


@pytest.mark.parametrize(
    ("quantised", "keeps_weight"),
    [
        ({"qweight": ("I32", (64, 8)), "scales": ("F16", (2, 64)), "qzeros": ("I32", (2, 8))}, False),  # AWQ, GPTQ
        ({"weight_packed": ("I32", (64, 8)), "weight_scale": ("F16", (64, 2)), "weight_shape": ("I64", (2,))}, False),
        ({"weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))}, True),  # FP8
        ({"weight.absmax": ("F32", (64,)), "weight.quant_state.nf4": ("I32", (8,))}, True),  # bitsandbytes
    ],
)
def test_a_quantised_model_has_matrices_of_other_names_and_types(
    tmp_path: Path, quantised: Tensors, keeps_weight: bool
) -> None:
    write_model_folder(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "any"})
    stem = Q_PROJ.removesuffix(".weight")
    added = {f"{stem}.{name}": tensor for name, tensor in quantised.items()}
    change_weights(tmp_path, lambda tensors: (tensors if keeps_weight else without(tensors, [Q_PROJ])) | added)
    check_complete(tmp_path)
    change_weights(tmp_path, lambda tensors: without(tensors, [Q_PROJ, f"{stem}.bias"]))
    reject(tmp_path, f"tensor {re.escape(stem)}")


def test_a_model_of_seven_billion_parameters_is_checked_within_two_seconds(tmp_path: Path) -> None:
    config = model_config("qwen2_5_vl", UI_TARS_7B, 152064)
    config["vision_config"] |= {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420}
    write_model_folder(tmp_path, config=config, num_shards=16)
    started_s = time.process_time()
    check_complete(tmp_path)
    assert time.process_time() - started_s < 2


# Files that are not what their names say.


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, r"a Git LFS pointer, not the file itself \(hint: run `git lfs pull` in "),
        ("<!DOCTYPE html><html><body>Log in</body></html>", "a web page, not the file itself"),
        ("../../.git/annex/objects/Vx/31/SHA256E-s4", "a git-annex pointer"),
    ],
)
def test_a_placeholder_is_not_taken_for_the_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (write_model_folder(tmp_path) / name).write_text(content)
    reject(tmp_path, f"{name}: {message}")


def test_a_link_to_a_missing_file_is_rejected(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path) / "model.safetensors"
    path.unlink()
    path.symlink_to("../blobs/4d7a")
    reject(tmp_path, "model.safetensors: a link to the missing file ../blobs/4d7a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[:100], "cut short within its header, after 100 bytes"),
        (lambda data: data[:-1], r"cut short: it has \d+ of \d+ bytes"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data + b"\0", "has 1 bytes after its last tensor"),
        (lambda data: b"PK\3\4" + data, "not a safetensors file"),
        (lambda data: data.replace(b'"BF16"', b'"BF61"', 1), "no valid type"),
        (lambda data: data.replace(b"[0, ", b"[8, ", 1), "does not match its shape"),
        (lambda data: data[:8] + b"[" + data[9:], "not a safetensors file"),
        (lambda data: data.replace(b"}}", b"}x", 1), "not valid JSON"),
    ],
)
def test_a_damaged_weight_file_is_rejected(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_model_folder(tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    reject(tmp_path, f"model.safetensors: .*{message}.*hint: copy")


# Files, shards and their index.


def test_a_shard_that_is_missing_or_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, num_shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    reject(folder, "model-00002-of-00003.safetensors: cut short")
    shard.unlink()
    reject(folder, "model-00002-of-00003.safetensors: not found, although model.safetensors.index.json names it")


def test_shards_without_an_index_are_rejected(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, num_shards=3)
    (folder / "model.safetensors.index.json").unlink()
    reject(folder, "model.safetensors.index.json: not found, but model-00001-of-00003.safetensors is one of several")


def test_a_weight_file_that_is_not_loaded_is_rejected(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "one")
    write_safetensors(folder / "model-old.safetensors", {HEAD: ("F32", (2, 2))})
    reject(folder, "model-old.safetensors: not part of model.safetensors, the only file")
    sharded = write_model_folder(tmp_path / "three", num_shards=3)
    write_safetensors(sharded / "model-old.safetensors", {HEAD: ("F32", (2, 2))})
    reject(sharded, "model-old.safetensors: not part of model.safetensors.index.json")
    shutil.copy(folder / "model.safetensors", sharded)
    reject(sharded, "contains both model.safetensors and shards")


def test_a_weight_file_of_another_name_is_rejected(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    reject(folder, "consolidated.safetensors: must be called model.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no valid weight_map"),
        ([], "has no valid weight_map"),
        ({"a": 3}, "has no valid weight_map"),
        ({"a": "../model.safetensors"}, "has no valid weight_map"),
        ({}, "not part of model.safetensors.index.json"),
    ],
)
def test_an_index_of_another_form_is_rejected(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = write_model_folder(tmp_path, num_shards=2)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    reject(folder, message)


def test_an_index_that_differs_from_the_files_is_rejected(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, num_shards=2)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    write_json(path, {"weight_map": without(weight_map, [Q_PROJ])})
    reject(folder, f"contains tensor {re.escape(Q_PROJ)}, but model.safetensors.index.json does not name it")
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {weight_map[Q_PROJ]}
    write_json(path, {"weight_map": weight_map | {Q_PROJ: other.pop()}})
    reject(folder, f"contains tensor {re.escape(Q_PROJ)}, but model.safetensors.index.json places it in")
    write_json(path, {"weight_map": weight_map | {"extra.weight": weight_map[Q_PROJ]}})
    reject(folder, "tensor extra.weight, which model.safetensors.index.json names, is missing")


def test_an_adapter_without_its_model_is_rejected(tmp_path: Path) -> None:
    write_json(write_model_folder(tmp_path) / "adapter_config.json", {})
    reject(tmp_path, "adapter_config.json: the directory holds an adapter.*merge_and_unload")


# Tensors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: without(tensors, [Q_PROJ]), rf"model.safetensors: tensor {Q_PROJ} is missing"),
        (lambda tensors: without(tensors, [Q_PROJ, HEAD]), r"tensor lm_head.weight and 1 others are missing"),
        (lambda tensors: without(tensors, [it for it in tensors if it.startswith("visual.")]), "tensor visual"),
        (lambda tensors: without(tensors, ["visual.merger.mlp.2.bias"]), "tensor visual.merger.mlp.2.bias is missing"),
        (retyped(Q_PROJ, "BF16", (64, 32)), r"has shape \[64, 32\], but config.json requires \[64, 64\]"),
        (retyped(HEAD, "BF16", (319, 64)), r"lm_head.weight has shape \[319, 64\]"),
        (retyped(Q_PROJ, "I32"), "has type I32, but config.json has no quantization_config"),
        (renamed(lambda name: f"module.{name}"), "tensor module.*must be called.*hint: save the model without its"),
        (renamed(lambda name: f"_orig_mod.{name}"), "tensor _orig_mod.*must be called"),
        (renamed(lambda name: f"base_model.model.{name}"), "base_model.model.*merge_and_unload"),
        (renamed(lambda name: f"language_model.{name}"), "must be called"),
        (renamed(lambda name: name.removeprefix("model.")), "tensor embed_tokens.weight must be called model.embed"),
        (
            lambda tensors: tensors | {f"{Q_PROJ.removesuffix('.weight')}.lora_A.weight": ("F32", (8, 64))},
            "lora_A.weight does not belong to the architecture.*merge_and_unload",
        ),
        (lambda tensors: tensors | {"value_head.weight": ("F32", (1, 64))}, "value_head.weight does not belong"),
        (lambda tensors: tensors | {"model.layers.3.mlp.up_proj.weight": ("F32", (1, 64))}, "layers.3.*belong"),
    ],
)
def test_weights_that_an_engine_would_not_load_as_saved_are_rejected(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    change_weights(write_model_folder(tmp_path), change)
    reject(tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "llama is not supported .hint: use a model of glm4v or qwen2_5_vl or qwen2_vl or qwen3_vl, or add",
        ),
        ({"model_type": ["qwen2_vl"]}, "is not supported"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is not a whole number from 1"),
        ({"hidden_size": "64"}, "hidden_size is not a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is not a whole number from 1 to 1024"),
        ({"num_hidden_layers": 4}, r"tensor model.layers.3.\S+ and \d+ others are missing"),
        ({"num_attention_heads": 5}, "do not divide one another"),
        ({"vision_config": []}, "must be JSON objects"),
        (
            {"vision_config": {"out_hidden_size": 32}},
            "the vision tower's output has 32 features, but hidden_size is 64",
        ),
        ({"image_token_id": "x"}, "image_token_id is not a token id"),
        ({"image_token_id": 7}, r"<\|image_pad\|> has the id 319, but config.json relies on the id 7"),
        ({"vocab_size": 152064}, r"has shape \[320, 64\], but config.json requires \[152064, 64\]"),
    ],
)
def test_a_configuration_of_another_model_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(write_model_folder(tmp_path) / "config.json", **changes)
    reject(tmp_path, message)


# Tokenizer, chat template and image processor.


def test_a_tokenizer_longer_than_the_embeddings_is_rejected(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({"id": 320, "content": "<|extra|>", "special": True})
    write_json(path, content)
    reject(tmp_path, r"token '<\|extra\|>' has the id 320, but the model has 320 embeddings")


def test_a_token_that_only_the_configuration_adds_is_counted(tmp_path: Path) -> None:
    decoder = {"400": {"content": "<|extra|>", "special": True}}
    edit_json(write_model_folder(tmp_path) / "tokenizer_config.json", added_tokens_decoder=decoder)
    reject(tmp_path, "has the id 400")


@pytest.mark.parametrize("content", [{}, {"model": {"vocab": 3}}, {"model": []}, {"model": {"vocab": {}}}])
def test_a_tokenizer_without_tokens_is_rejected(tmp_path: Path, content: dict[str, Any]) -> None:
    write_json(write_model_folder(tmp_path) / "tokenizer.json", content)
    reject(tmp_path, r"tokenizer.json: (has no vocabulary|there are no tokens)")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>"])
def test_a_tokenizer_without_a_token_of_the_model_is_rejected(tmp_path: Path, token: str) -> None:
    path = write_model_folder(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace(token, "<|other|>"))
    reject(tmp_path, rf"token {re.escape(token)} is missing, but config.json relies on the id \d+")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eos_token": "<|endoftext|>"},
            r"ends a turn with '<\|im_end\|>', but eos_token is '<\|endoftext\|>'.*hint: set eos_token to .<\|im_e",
        ),
        ({"eos_token": None}, "eos_token is missing"),
        ({"eos_token": 7}, "eos_token is missing"),
        ({"chat_template": None}, "chat template not found"),
        ({"chat_template": []}, "chat template not found"),
        ({"chat_template": TEMPLATE.replace("<|im_end|>", "")}, "ends a turn with ''"),
        ({"chat_template": TEMPLATE.replace("<|image_pad|>", "")}, r"does not write <\|image_pad\|> once"),
        ({"chat_template": TEMPLATE.replace("add_generation_prompt", "false")}, "does not open the turn"),
        ({"chat_template": "{{ messages }}<|im_end|>"}, "does not write"),
        ({"chat_template": "{% for message in %}"}, "cannot be rendered"),
        ({"chat_template": "{{ raise_exception('no images') }}"}, "cannot be rendered: no images"),
        ({"chat_template": "{{ messages[7]['role'] }}"}, "cannot be rendered"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "cannot be rendered|does not write"),
    ],
)
def test_a_template_whose_turns_the_policy_could_not_end_is_rejected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(write_model_folder(tmp_path) / "tokenizer_config.json", **changes)
    reject(tmp_path, message)


def test_named_templates_and_marks_of_generated_text_are_understood(tmp_path: Path) -> None:
    marked = TEMPLATE.replace("{{ content['text'] }}", "{% generation %}{{ content['text'] }}{% endgeneration %}")
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": marked}]
    edit_json(write_model_folder(tmp_path) / "tokenizer_config.json", chat_template=templates)
    check_complete(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "the image processor has patch_size = 16, but the vision tower in config.json has 14"),
        ({"merge_size": 4}, "the image processor has merge_size = 4"),
        ({"max_pixels": "many"}, "max_pixels of the image processor is missing or not a positive number"),
        ({"patch_size": None}, "patch_size of the image processor is missing"),
    ],
)
def test_an_image_processor_of_another_model_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(write_model_folder(tmp_path) / "preprocessor_config.json", **changes)
    reject(tmp_path, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model_folder(tmp_path) / name).unlink()
    reject(tmp_path, f"not found .*{name.replace('model', '')}")
