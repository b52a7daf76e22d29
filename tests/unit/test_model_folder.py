"""A model folder is looked at before it is loaded: is it whole, and of the family that the run speaks?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.families import FamilyName
from deskrl.core.model_folder import refuse_incomplete, refuse_other_family, refuse_quantized

PUBLISHED = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}


def make_folder(folder: Path, architecture: str = "qwen2_5_vl", **sizing: int) -> Path:
    """The small files of a model as published, and an empty one for its weights."""
    folder.mkdir(exist_ok=True)
    files: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": architecture},
        "preprocessor_config.json": PUBLISHED | sizing,
        "tokenizer.json": {},
        "tokenizer_config.json": {"chat_template": "{{ messages }}"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def run(family: FamilyName, **changes: Any) -> RunConfig:
    values = {"desktop": {"width": 1920, "height": 1080}, **changes}
    return RunConfig.model_validate({**values, "agent": {"family": family, **changes.get("agent", {})}})


def test_a_published_folder_is_whole(tmp_path: Path) -> None:
    refuse_incomplete(make_folder(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").unlink()
    refuse_incomplete(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", {"model_type": "llama"}, "holds a llama model, and deskrl knows Qwen2-VL and Qwen2.5-VL"),
        ("tokenizer_config.json", {}, "lacks a chat template"),
        ("config.json", [], "holds no JSON object"),
    ],
)
def test_what_could_not_be_served_is_refused(tmp_path: Path, name: str, content: Any, told: str) -> None:
    (make_folder(tmp_path) / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        refuse_incomplete(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "family", "fits"),
    [
        ("qwen2_vl", "ui_tars_1_0", True),
        ("qwen2_vl", "ui_tars_1_5", False),
        ("qwen2_vl", "ui_tars_2", True),
        ("qwen2_5_vl", "ui_tars_1_0", False),
        ("qwen2_5_vl", "ui_tars_1_5", True),
        ("qwen2_5_vl", "ui_tars_2", True),
    ],
)
def test_a_model_is_prompted_as_its_own_family_or_not_at_all(
    tmp_path: Path, architecture: str, family: FamilyName, fits: bool
) -> None:
    config = run(family, model={"path": make_folder(tmp_path, architecture)})
    if fits:
        refuse_other_family(config)
        return
    with pytest.raises(UserError, match=f"agent.family = {family} speaks to a Qwen.*; set agent.family to"):
        refuse_other_family(config)


def test_a_built_model_is_of_the_family_or_refused(tmp_path: Path) -> None:
    refuse_other_family(run("ui_tars_1_0", model={"build": "tiny"}))
    with pytest.raises(UserError, match=r"build = qwen_3b_shape is a Qwen2\.5-VL, and agent\.family = ui_tars_1_0"):
        refuse_other_family(run("ui_tars_1_0", model={"build": "qwen_3b_shape"}))


def test_pixels_are_counted_as_the_model_sees_them_or_the_run_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, max_pixels=1_003_520)
    with pytest.raises(UserError) as refused:
        refuse_other_family(run("ui_tars_1_5", model={"path": folder}))
    assert "shows screenshots of 1920 x 1080 as 1316 x 728" in str(refused.value)
    assert "UI-TARS 1.5 count in 1932 x 1092" in str(refused.value)
    assert "set agent.image_width and agent.image_height to 1316 and 728" in str(refused.value)
    refuse_other_family(run("ui_tars_2", model={"path": folder}))
    refuse_other_family(run("ui_tars_1_5", model={"path": folder}, agent={"image_width": 1316, "image_height": 728}))


@pytest.mark.parametrize(
    ("inference", "told"),
    [
        ({"quantization": "int4"}, "inference.quantization = int4 serves other weights than those that learn"),
        ({"engine_args": {"quantization": "fp8"}}, r"inference.engine_args.quantization = fp8 serves other weights"),
    ],
)
def test_a_run_does_not_act_with_fewer_bits_than_it_learns_with(inference: dict[str, Any], told: str) -> None:
    refuse_quantized(run("ui_tars_1_5"))
    with pytest.raises(UserError, match=f"{told}.*; unset it; `deskrl eval` takes it"):
        refuse_quantized(run("ui_tars_1_5", inference=inference))


def test_a_model_that_was_quantised_cannot_learn(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    refuse_quantized(run("ui_tars_1_5", model={"path": folder}))
    config = {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds weights quantised by awq, which cannot learn; name the original model"):
        refuse_quantized(run("ui_tars_1_5", model={"path": folder}))


def test_integers_are_not_served_beside_float32() -> None:
    with pytest.raises(ValueError, match="quantization needs the dtype bfloat16 or float16"):
        run("ui_tars_1_5", inference={"quantization": "int4", "dtype": "float32"})


def test_a_folder_elsewhere_is_not_judged_here(tmp_path: Path) -> None:
    refuse_other_family(run("ui_tars_1_0", model={"path": tmp_path / "on-another-machine"}))
