"""Replicas of further architectures in the format of published models; CI serves a Qwen2.5-VL and a Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

import pytest
from inference_kit import check_published_architecture


@pytest.mark.parametrize("architecture", ["qwen2_vl", "glm4v"])
def test_a_model_as_published_is_served_and_updated_like_a_qwen2_5_vl(architecture: str, tmp_path: Path) -> None:
    check_published_architecture(architecture, tmp_path)
