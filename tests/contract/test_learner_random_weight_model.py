"""Random-weight model: a small shape of the same architecture and files as the 7B shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_kit import SMALL_SHAPE

from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import read_image_sizing, read_vocab_size, suppressed_ids
from deskrl.learner.policy.architectures import QWEN_CHAT
from deskrl.learner.policy.policy_model import load_policy, load_processor
from deskrl.learner.policy.random_weight_model import UI_TARS_7B, build_random_weight_model, model_config
from deskrl.learner.weights.canary import make_canary

CORPUS = ["press the red button"] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped")
    build_random_weight_model(folder, seed=1, shape=SMALL_SHAPE, largest_number=1280, corpus=CORPUS)
    return folder


def test_the_7b_shape_has_the_parameters_of_a_qwen2_5_vl_7b() -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(model_config(UI_TARS_7B, dict.fromkeys(QWEN_CHAT.special_tokens, 0)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_292_166_656
    assert model.lm_head.weight.shape == (152064, 3584)


def test_a_random_weight_model_loads_like_any_other_and_has_finite_logprobs(folder: Path) -> None:
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, read_vocab_size(folder))
    policy = load_policy(folder, suppressed, freeze_vision=True)
    probe = make_canary(policy, processor, read_image_sizing(folder), 280, 168)
    with torch.no_grad():
        scores = policy(probe.batch, 1.0, suppress=False)
    assert bool(scores.logprobs_N.isfinite().all())
    assert bool(scores.entropy_N.isfinite().all())


def test_vocabulary_rows_without_a_token_are_suppressed(folder: Path) -> None:
    tokenizer = load_processor(folder).tokenizer
    assert len(tokenizer) < 4096
    assert set(range(len(tokenizer), 4096)) <= set(suppressed_ids(tokenizer, read_vocab_size(folder)))


def test_no_weight_file_exceeds_the_shard_size_in_bfloat16(folder: Path) -> None:
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for name in set(index.values()):
        with safe_open(folder / name, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a mapping)
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= SMALL_SHAPE.shard_bytes


def test_the_seed_determines_the_weights(folder: Path, tmp_path: Path) -> None:
    build_random_weight_model(tmp_path / "same", 1, SMALL_SHAPE, 1280, CORPUS)
    build_random_weight_model(tmp_path / "other", 2, SMALL_SHAPE, 1280, CORPUS)
    first = min(path.name for path in folder.glob("*.safetensors"))
    assert image_hash((tmp_path / "same" / first).read_bytes()) == image_hash((folder / first).read_bytes())
    assert image_hash((tmp_path / "other" / first).read_bytes()) != image_hash((folder / first).read_bytes())


def test_a_tied_model_has_no_separate_output_head(tmp_path: Path) -> None:
    build_random_weight_model(tmp_path, 0, replace(SMALL_SHAPE, tied=True), 1280, CORPUS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in index


def test_a_screenshot_of_1280_by_720_has_as_many_tokens_as_with_the_published_model(folder: Path) -> None:
    assert read_image_sizing(folder).num_tokens(1280, 720) == 1196
