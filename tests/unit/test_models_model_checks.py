"""Checks of the model of a run before it is loaded: action language, image scaling and quantisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_folder_kit import SIZING, write_json, write_model_folder

from deskrl.actor.agent.model_fit import check_language
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.models.model_checks import check_not_quantized


def make_folder(folder: Path, architecture: str = "qwen2_5_vl", **sizing: int) -> Path:
    """Write a model folder whose image processor has other settings."""
    write_model_folder(folder, architecture)
    write_json(folder / "preprocessor_config.json", SIZING | sizing)
    return folder


def run(language: str, **changes: Any) -> RunConfig:
    values = {"desktop": {"width": 1920, "height": 1080}, **changes}
    return RunConfig.model_validate({**values, "agent": {"action_language": language, **changes.get("agent", {})}})


@pytest.mark.parametrize(
    ("architecture", "language", "fits"),
    [
        ("qwen2_vl", "ui_tars_1_0", True),
        ("qwen2_vl", "ui_tars_1_5", False),
        ("qwen2_vl", "ui_tars_2", True),
        ("qwen2_5_vl", "ui_tars_1_0", False),
        ("qwen2_5_vl", "ui_tars_1_5", True),
        ("qwen2_5_vl", "ui_tars_2", True),
        ("qwen2_5_vl", "qwen2_5_vl", True),
        ("qwen2_5_vl", "qwen3_vl", False),
        ("qwen2_vl", "opencua", True),
    ],
)
def test_a_model_of_another_language_is_rejected(tmp_path: Path, architecture: str, language: str, fits: bool) -> None:
    config = run(language, model={"path": make_folder(tmp_path, architecture)})
    if fits:
        check_language(config)
        return
    with pytest.raises(
        UserError, match=f"agent.action_language = {language} requires Qwen.*hint: set agent.action_language to"
    ):
        check_language(config)


def test_a_built_model_of_another_language_is_rejected(tmp_path: Path) -> None:
    check_language(run("ui_tars_1_0", model={"build": "tiny"}))
    with pytest.raises(
        UserError, match=r"build = qwen_3b_shape is a Qwen2\.5-VL model, but agent.action_language = ui_tars_1_0"
    ):
        check_language(run("ui_tars_1_0", model={"build": "qwen_3b_shape"}))


def test_an_image_size_that_the_processor_would_scale_is_rejected_for_pixel_coordinates(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, max_pixels=1_003_520)
    with pytest.raises(UserError) as rejected:
        check_language(run("ui_tars_1_5", model={"path": folder}))
    assert "scales screenshots of 1920 x 1080 to 1316 x 728" in str(rejected.value)
    assert "UI-TARS 1.5 refer to 1932 x 1092" in str(rejected.value)
    assert "set agent.image_width and agent.image_height to 1316 and 728" in str(rejected.value)
    check_language(run("ui_tars_2", model={"path": folder}))
    check_language(run("ui_tars_1_5", model={"path": folder}, agent={"image_width": 1316, "image_height": 728}))


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        ({"quantization": "int4"}, "inference.quantization = int4: quantised replicas cannot load updates"),
        ({"engine_args": {"quantization": "fp8"}}, r"inference.engine_args.quantization = fp8: quantised replicas"),
    ],
)
def test_a_training_run_with_quantised_replicas_is_rejected(inference: dict[str, Any], message: str) -> None:
    check_not_quantized(run("ui_tars_1_5"))
    with pytest.raises(UserError, match=f"{message}.*hint: unset inference.*; `deskrl eval` supports it"):
        check_not_quantized(run("ui_tars_1_5", inference=inference))


def test_a_quantised_model_is_rejected_for_training(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    check_not_quantized(run("ui_tars_1_5", model={"path": folder}))
    config = {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"weights quantised by awq cannot be trained .hint: set model.path to the original model"
    ):
        check_not_quantized(run("ui_tars_1_5", model={"path": folder}))
    with pytest.raises(UserError, match=r"by awq cannot be trained, not even by learner.lora: replicas would serve"):
        check_not_quantized(run("ui_tars_1_5", model={"path": folder}, learner={"lora": {"rank": 8}}))


def test_quantisation_requires_a_16_bit_dtype() -> None:
    with pytest.raises(ValueError, match="quantization requires dtype bfloat16 or float16"):
        run("ui_tars_1_5", inference={"quantization": "int4", "dtype": "float32"})


def test_a_model_directory_on_another_machine_is_not_checked(tmp_path: Path) -> None:
    check_language(run("ui_tars_1_0", model={"path": tmp_path / "on-another-machine"}))
