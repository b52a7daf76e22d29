"""The families of UI-TARS, as all roles must agree on them: whose architecture it is, and what its coordinates count.

Plain facts. Knows no prompt and no action (the actor's `prompts` and `grammar`), no model and no configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deskrl.core.rendering import ImageSizing

FamilyName = Literal["ui_tars_1_0", "ui_tars_1_5", "ui_tars_2"]
Architecture = Literal["qwen2_vl", "qwen2_5_vl"]

RELATIVE_SPAN = 1000
"""Relative coordinates count from 0 to this, across and down, whatever the screenshot's shape."""

UI_TARS_SIZING = ImageSizing(patch_size=14, merge_size=2, min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
"""How the processors of all published models scale a screenshot."""


@dataclass(frozen=True)
class Family:
    """One family."""

    title: str
    architectures: tuple[Architecture, ...]
    """Of models that speak it, as `model_type` in their config.json; the first is what `model.build` makes of it."""
    relative: bool
    """Whether coordinates count thousandths of the screenshot, or pixels of it as the model sees it."""

    def span(self, width: int, height: int) -> tuple[int, int]:
        """How far coordinates go, across and down, on a screenshot of this size."""
        return (RELATIVE_SPAN, RELATIVE_SPAN) if self.relative else UI_TARS_SIZING.scaled(width, height)


FAMILIES: Mapping[FamilyName, Family] = {
    "ui_tars_1_0": Family("UI-TARS 1.0", ("qwen2_vl",), relative=True),
    "ui_tars_1_5": Family("UI-TARS 1.5", ("qwen2_5_vl",), relative=False),
    "ui_tars_2": Family("UI-TARS 2", ("qwen2_5_vl", "qwen2_vl"), relative=True),
}
