"""Glyph atlas: bitmaps and widths of the characters of names, in all fonts and sizes of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deskrl.core.errors import UserError
from deskrl.learner.pretraining.names import CHARACTERS

CELL_WIDTH = 30
CELL_HEIGHT = 32
_LEFT = 2
"""Column of a cell at which a glyph starts; glyphs that protrude to the left are complete."""


@dataclass(frozen=True)
class GlyphAtlas:
    """Bitmaps of characters. Index 0 of the dimension of codes is the empty glyph of padding."""

    bitmaps: Tensor
    """Opacity from 0 to 1, with shape (fonts, sizes, codes, CELL_HEIGHT, CELL_WIDTH)."""
    advances: Tensor
    """Widths in pixels, with shape (fonts, sizes, codes); 0 for padding."""
    line_heights: Tensor
    """Heights of a line in pixels, with shape (fonts, sizes)."""
    left: int = _LEFT


def build_atlas(fonts: Sequence[str], sizes: Sequence[int], device: torch.device) -> GlyphAtlas:
    """Draw the characters with Pillow.

    Args:
        fonts: file names or paths of TrueType or OpenType fonts; names are searched in the font folders of the system.
        sizes: font sizes in pixels.
        device: device of the tensors.

    Raises:
        UserError: a font is not found.
    """
    bitmaps = torch.zeros(len(fonts), len(sizes), len(CHARACTERS) + 1, CELL_HEIGHT, CELL_WIDTH)
    advances = torch.zeros(len(fonts), len(sizes), len(CHARACTERS) + 1, dtype=torch.long)
    line_heights = torch.zeros(len(fonts), len(sizes), dtype=torch.long)
    for row, name in enumerate(fonts):
        for column, size in enumerate(sizes):
            font = _open_font(name, size)
            ascent, descent = font.getmetrics()
            line_heights[row, column] = min(ascent + descent, CELL_HEIGHT)
            for code, character in enumerate(CHARACTERS, start=1):
                advances[row, column, code] = max(1, round(font.getlength(character)))
                bitmaps[row, column, code] = _draw(character, font)
    return GlyphAtlas(bitmaps.to(device), advances.to(device), line_heights.to(device))


def _open_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(name, size)
    except OSError as error:
        hint = "install the font (Debian: fonts-dejavu-core, fonts-urw-base35) or remove it from `fonts`"
        raise UserError(f"font {name} not found", hint) from error


def _draw(character: str, font: ImageFont.FreeTypeFont) -> Tensor:
    """Return the bitmap of a character, with shape (CELL_HEIGHT, CELL_WIDTH)."""
    picture = Image.new("L", (CELL_WIDTH, CELL_HEIGHT))
    ImageDraw.Draw(picture).text((_LEFT, 0), character, font=font, fill=255)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(CELL_HEIGHT, CELL_WIDTH).float() / 255
