"""Engine start: an error of vLLM becomes one line that names its cause."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from model_folder_kit import write_json

from deskrl.inference.vllm_engine import rejection


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace vLLM by a module that knows one model class: importing the real one takes seconds."""
    vllm: Any = ModuleType("vllm")
    vllm.__version__ = "0.26.0"
    vllm.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: {"KnownForConditionalGeneration": None}.keys())
    monkeypatch.setitem(sys.modules, "vllm", vllm)


def test_an_architecture_that_vllm_lacks_is_named_with_the_version(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"architectures": ["NewForConditionalGeneration"]})
    line = str(rejection(tmp_path, ValueError("not\nsupported")))
    assert "vLLM 0.26.0 cannot serve NewForConditionalGeneration: not supported (hint: install a version" in line
    assert "\n" not in line and str(tmp_path) in line


@pytest.mark.parametrize("content", [{}, {"architectures": ["KnownForConditionalGeneration"]}])
def test_any_other_error_of_vllm_is_attributed_to_the_settings(tmp_path: Path, content: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", content)
    line = str(rejection(tmp_path, ValueError("max_model_len is too large")))
    assert line.startswith("vLLM rejects the settings of the inference section: max_model_len is too large (hint: ")
