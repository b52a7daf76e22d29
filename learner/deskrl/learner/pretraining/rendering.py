"""Rendering of layouts: pictures of a batch of screens, and the character under each part of each patch."""

from __future__ import annotations

import torch
from torch import Tensor

from deskrl.learner.pretraining.glyph_atlas import CELL_HEIGHT, CELL_WIDTH, GlyphAtlas
from deskrl.learner.pretraining.layouts import Layout, Random
from deskrl.learner.pretraining.names import SPACE

PATCH = 14
"""Side of a patch in pixels."""
SLOTS = 4
"""Reading targets per patch, from left to right: narrow characters are 3 to 4 pixels wide."""
_SLOT_PIXELS = PATCH / SLOTS
_SLOTS_PER_GLYPH = 9
_ROWS_PER_GLYPH = 3
_NOISE = 0.02


def render(layout: Layout, width: int, height: int, atlas: GlyphAtlas, random: Random) -> tuple[Tensor, Tensor]:
    """Draw screens.

    Args:
        layout: layouts.
        width: width of the screens in pixels, a multiple of PATCH.
        height: height of the screens in pixels, a multiple of PATCH.
        atlas: glyphs.
        random: random numbers for noise.

    Returns:
        Pictures from 0 to 1 with shape (screens, 3, height, width), and reading targets with shape
        (screens, height / PATCH, width / PATCH * SLOTS).
    """
    owners, palette, inks = _paint_boxes(layout, width, height)
    screen = torch.arange(len(owners), device=owners.device)[:, None]
    flat = owners.view(len(owners), -1).long()
    glyphs = _glyphs(layout, atlas)
    opacity = _paint_text(glyphs, atlas, len(owners), width, height).view(len(owners), -1, 1)
    picture = palette[screen, flat] * (1 - opacity) + inks[screen, flat] * opacity
    strength = _NOISE * random.uniform(len(owners), 1, 1) ** 2
    picture = (picture + strength * (random.uniform(*picture.shape) - 0.5)).clamp(0, 1)
    picture = picture.transpose(1, 2).reshape(len(owners), 3, height, width)
    return picture, _reading_targets(glyphs, len(owners), width, height)


def _paint_boxes(layout: Layout, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each pixel the index of what covers it, and the colours of these indices below and of text."""
    x = torch.arange(width, device=layout.boxes.device)
    y = torch.arange(height, device=layout.boxes.device)[:, None]
    num_screens, num_boxes = layout.drawn.shape
    owners = torch.zeros(num_screens, height, width, dtype=torch.uint8, device=x.device)
    empty = torch.zeros_like(layout.boxes[:, 0])
    for index in range(num_boxes):
        box = torch.where(layout.drawn[:, index, None], layout.boxes[:, index], empty)
        mark = torch.where(layout.drawn[:, index, None], layout.marks[:, index], empty)
        one = torch.tensor([1, 1, -1, -1], device=x.device)
        for part, (left, top, right, bottom) in enumerate(
            edges.T[..., None, None] for edges in (box, box + one, mark, mark + one)
        ):
            inside = ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))
            owners = torch.where(inside, 1 + 4 * index + part, owners)
    fill, border, ink = layout.colours.unbind(2)
    background = layout.background[:, None]
    palette = torch.stack([border, fill, ink, fill], 2).flatten(1, 2)
    return owners, torch.cat([background, palette], 1), torch.cat([background, ink.repeat_interleave(4, 1)], 1)


class _Glyphs:
    """Visible characters of a batch, one per entry: screen, code, font, size, left, top, width and height."""

    def __init__(self, *columns: Tensor) -> None:
        self.screen, self.code, self.font, self.size, self.left, self.top, self.width, self.height = columns


def _glyphs(layout: Layout, atlas: GlyphAtlas) -> _Glyphs:
    codes = torch.where(layout.drawn[..., None], layout.codes, torch.zeros_like(layout.codes))
    fonts, sizes = layout.fonts[..., None].expand_as(codes), layout.sizes[..., None].expand_as(codes)
    advances = atlas.advances[fonts, sizes, codes]
    lefts = layout.text_at[..., :1] + advances.cumsum(-1) - advances
    tops = layout.text_at[..., 1:].expand_as(codes)
    heights = atlas.line_heights[fonts, sizes]
    screen, box, position = at = ((codes > 0) & (codes != SPACE)).nonzero(as_tuple=True)
    del box, position
    return _Glyphs(screen, *(values[at] for values in (codes, fonts, sizes, lefts, tops, advances, heights)))


def _paint_text(glyphs: _Glyphs, atlas: GlyphAtlas, num_screens: int, width: int, height: int) -> Tensor:
    """Return the opacity of text for each pixel, with shape (screens, height, width)."""
    device = glyphs.screen.device
    rows = glyphs.top[:, None, None] + torch.arange(CELL_HEIGHT, device=device)[:, None]
    columns = glyphs.left[:, None, None] - atlas.left + torch.arange(CELL_WIDTH, device=device)
    visible = (rows < height) & (columns >= 0) & (columns < width)
    index = (glyphs.screen[:, None, None] * height + rows) * width + columns
    index = torch.where(visible, index, num_screens * height * width)
    opacity = torch.zeros(num_screens * height * width + 1, device=device)
    bitmaps = atlas.bitmaps[glyphs.font, glyphs.size, glyphs.code]
    opacity.scatter_reduce_(0, index.flatten(), bitmaps.flatten(), "amax")
    return opacity[:-1].view(num_screens, height, width)


def _reading_targets(glyphs: _Glyphs, num_screens: int, width: int, height: int) -> Tensor:
    """Return the code of the character that covers the middle of each slot, 0 for none."""
    device = glyphs.screen.device
    num_rows, num_slots = height // PATCH, width // PATCH * SLOTS
    first_slot = ((glyphs.left - _SLOT_PIXELS / 2) / _SLOT_PIXELS).ceil().long()
    slots = first_slot[:, None, None] + torch.arange(_SLOTS_PER_GLYPH, device=device)
    middle = (slots + 0.5) * _SLOT_PIXELS
    covers = (middle < (glyphs.left + glyphs.width)[:, None, None]) & (slots >= 0) & (slots < num_slots)
    # A line is at least as high as a patch here, so that each of its characters has a row of patches.
    line_top = (glyphs.top - (PATCH - glyphs.height).clamp(min=0) // 2)[:, None, None]
    line_bottom = line_top + glyphs.height.clamp(min=PATCH)[:, None, None]
    first_row = ((line_top - PATCH / 2) / PATCH).ceil().long()
    rows = first_row + torch.arange(_ROWS_PER_GLYPH, device=device)[:, None]
    covers = covers & ((rows + 0.5) * PATCH < line_bottom) & (rows >= 0) & (rows < num_rows)
    index = (glyphs.screen[:, None, None] * num_rows + rows) * num_slots + slots
    index = torch.where(covers, index, num_screens * num_rows * num_slots)
    targets = torch.zeros(num_screens * num_rows * num_slots + 1, dtype=torch.long, device=device)
    targets.scatter_(0, index.flatten(), glyphs.code[:, None, None].expand_as(index).flatten())
    return targets[:-1].view(num_screens, num_rows, num_slots)
