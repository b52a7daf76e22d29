"""The model architectures of deskrl keep the contract that the suite for architectures of one's own checks."""

from __future__ import annotations

from deskrl.testing.architectures import ArchitectureSuite


class TestQwen2VL(ArchitectureSuite):
    selection = "qwen2_vl"


class TestQwen25VL(ArchitectureSuite):
    selection = "qwen2_5_vl"


class TestQwen3VL(ArchitectureSuite):
    selection = "qwen3_vl"


class TestGlm4V(ArchitectureSuite):
    selection = "glm4v"
