"""Whether a run has to build its model before its roles start."""

from pathlib import Path

import pytest

from deskrl.core.config import RunConfig
from deskrl.launch.role_launch import needs_model


@pytest.mark.parametrize("last_written", ["model.safetensors", "model.safetensors.index.json"])
def test_a_model_is_built_until_its_last_weight_file_exists(tmp_path: Path, last_written: str) -> None:
    config = RunConfig.model_validate({"runs": tmp_path, "model": {"build": "ui_tars_7b_shape"}})
    config.model_folder.mkdir(parents=True)
    (config.model_folder / "model-00001-of-00016.safetensors").write_bytes(b"")
    assert needs_model(config), "the build was interrupted"
    (config.model_folder / last_written).write_bytes(b"")
    assert not needs_model(config)


def test_an_existing_model_folder_is_not_built(tmp_path: Path) -> None:
    assert not needs_model(RunConfig.model_validate({"runs": tmp_path, "model": {"path": tmp_path}}))
