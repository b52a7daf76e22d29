"""What a run still needs before its roles start."""

from pathlib import Path

import pytest

from deskrl.core.config import RunConfig
from deskrl.core.running.starting import needs_model


@pytest.mark.parametrize("last_written", ["model.safetensors", "model.safetensors.index.json"])
def test_a_model_is_built_once_whether_its_weights_are_one_file_or_several(tmp_path: Path, last_written: str) -> None:
    config = RunConfig.model_validate({"runs": tmp_path, "model": {"build": "ui_tars_7b_shape"}})
    config.model_folder.mkdir(parents=True)
    (config.model_folder / "model-00001-of-00016.safetensors").write_bytes(b"")
    assert needs_model(config), "cut short"
    (config.model_folder / last_written).write_bytes(b"")
    assert not needs_model(config)


def test_a_model_that_is_there_needs_no_building(tmp_path: Path) -> None:
    assert not needs_model(RunConfig.model_validate({"runs": tmp_path, "model": {"path": tmp_path}}))
