"""Layouts of synthetic screens: a window with a grid of buttons, labels, fields, check boxes or list rows.

Layouts are tensors over a batch of screens of one size, so that thousands of screens per second can be drawn on a GPU.
Names, grids and fill colours are each divided by a hash: training never draws held-out ones, and held-out screens
consist of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deskrl.learner.pretraining.glyph_atlas import GlyphAtlas
from deskrl.learner.pretraining.names import MIN_LENGTH, SPACE, NameStyle, draw_names

NUM_FRAMES = 2
"""Boxes of each screen before those of its elements: the body of the window and its title bar."""
BUTTON, LABEL, FIELD, CHECK_BOX, LIST_ROW = range(5)
"""Kinds of elements."""
_MARK_PIXELS = 11
_MARK_SPACE = 16
_COLOUR_LEVELS = 4
_GRID_MODULUS = 5


@dataclass(frozen=True)
class ScreenStyle:
    """Distribution of the screens of one level of the curriculum. Ranges include both ends."""

    width: int
    height: int
    columns: tuple[int, int]
    rows: tuple[int, int]
    num_elements: tuple[int, int]
    sizes: tuple[int, int]
    """Range of indices into the font sizes of the atlas."""
    names: NameStyle = field(default_factory=NameStyle)
    window_rate: float = 0.5
    """Probability of a window with a title bar; otherwise the elements fill the screen."""
    stack_rate: float = 0.25
    """Probability that all elements are rows of lists, which fill their cells without gaps."""


@dataclass(frozen=True)
class Layout:
    """Boxes of a batch of screens, in drawing order: window body, title bar, elements."""

    boxes: Tensor
    """Pixels (left, top, right, bottom), right and bottom exclusive, with shape (screens, boxes, 4)."""
    drawn: Tensor
    """Whether a box exists, with shape (screens, boxes)."""
    colours: Tensor
    """Fill, border and text colour from 0 to 1, with shape (screens, boxes, 3, 3)."""
    marks: Tensor
    """Square of a check box, in pixels, with shape (screens, boxes, 4); empty for other elements."""
    codes: Tensor
    """Characters of the text, with shape (screens, boxes, characters)."""
    text_at: Tensor
    """Left and top of the text in pixels, with shape (screens, boxes, 2)."""
    fonts: Tensor
    sizes: Tensor
    background: Tensor
    """Colour of the desktop, with shape (screens, 3)."""
    grid: Tensor
    """Columns and rows, with shape (screens, 2)."""


class Random:
    """Random tensors from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._device = generator.device

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers from 0 to 1."""
        return torch.rand(shape, generator=self.generator, device=self._device)

    def integer(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self._device)


def draw_layout(random: Random, num_screens: int, style: ScreenStyle, atlas: GlyphAtlas, held_out: bool) -> Layout:
    """Draw a batch of layouts.

    Args:
        random: random numbers, on the device of the result.
        num_screens: number of screens.
        style: distribution of the screens.
        atlas: glyphs, which determine the sizes of texts.
        held_out: whether names, grids and fill colours are held-out ones.
    """
    num_elements = style.num_elements[1]
    num_boxes = NUM_FRAMES + num_elements
    frames, bar_height, has_window = _window_boxes(random, num_screens, style)
    grid = _draw_grid(random, num_screens, style, held_out)
    cells, exists = _cells(random, frames[:, 0], bar_height, grid, num_elements)
    count = random.integer(*style.num_elements, num_screens, 1)
    exists &= torch.arange(num_elements, device=count.device) < count
    names = draw_names(random.generator, num_screens, num_boxes - 1, style.names, held_out)
    codes = torch.cat([torch.zeros_like(names[:, :1]), names], 1)
    regions = torch.cat([frames, cells], 1)
    kinds = _draw_kinds(random, num_screens, num_elements, style.stack_rate)
    drawn = torch.cat([has_window.expand(-1, NUM_FRAMES), exists], 1)
    fonts = _per_screen(random, random.integer(0, atlas.advances.shape[0] - 1, num_screens, num_boxes), 0.8)
    sizes = _per_screen(random, random.integer(*style.sizes, num_screens, num_boxes), 0.6)
    room = regions[..., 2] - regions[..., 0] - 8 - _MARK_SPACE * (kinds == CHECK_BOX)
    sizes, codes, text_width = fit_text(codes, fonts, sizes, room, regions[..., 3] - regions[..., 1], atlas)
    line_height = atlas.line_heights[fonts, sizes]
    is_named = ((codes > 0).sum(-1) >= MIN_LENGTH) & (line_height <= regions[..., 3] - regions[..., 1])
    drawn[:, NUM_FRAMES:] &= (is_named & ~_repeats(codes))[:, NUM_FRAMES:]
    boxes = _place_boxes(random, regions, kinds, text_width, line_height)
    text_at, marks = _place_text(random, boxes, kinds, text_width, line_height)
    background = _draw_colours(random, (num_screens,), held_out)
    colours = _element_colours(random, kinds, background, has_window, held_out)
    return Layout(boxes, drawn, colours, marks, codes * is_named[..., None], text_at, fonts, sizes, background, grid)


def fit_text(
    codes: Tensor, fonts: Tensor, sizes: Tensor, room: Tensor, height: Tensor, atlas: GlyphAtlas
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce font sizes, then lengths, until all texts fit.

    Args:
        codes: characters with shape (screens, boxes, characters).
        fonts: font index of each text.
        sizes: largest allowed size index of each text.
        room: available width in pixels.
        height: available height in pixels.
        atlas: glyphs.

    Returns:
        Size indices, codes with surplus characters replaced by 0, and widths in pixels.
    """
    size = torch.arange(atlas.advances.shape[1], device=codes.device)
    ends = atlas.advances[fonts[..., None, None], size[:, None], codes[..., None, :]].cumsum(-1)
    fits = (ends[..., -1] <= room[..., None]) & (atlas.line_heights[fonts] <= height[..., None])
    allowed = fits & (size <= sizes[..., None])
    chosen = torch.where(allowed, size, torch.zeros_like(size)).amax(-1)
    ends = ends.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, ends.shape[-1])).squeeze(2)
    codes = torch.where(ends <= room[..., None], codes, torch.zeros_like(codes))
    following = torch.cat([codes[..., 1:], torch.zeros_like(codes[..., :1])], -1)
    codes = torch.where((codes == SPACE) & (following == 0), torch.zeros_like(codes), codes)
    return chosen, codes, atlas.advances[fonts[..., None], chosen[..., None], codes].sum(-1)


def is_held_out_grid(grid: Tensor) -> Tensor:
    """Return whether grids (columns and rows in the last dimension) are held out."""
    return (grid[..., 0] + 2 * grid[..., 1]) % _GRID_MODULUS == 0


def is_held_out_colour(colours: Tensor) -> Tensor:
    """Return whether colours (red, green and blue from 0 to 1 in the last dimension) are held out."""
    level = (colours * _COLOUR_LEVELS).long().clamp(0, _COLOUR_LEVELS - 1)
    return (level[..., 0] + 3 * level[..., 1] + level[..., 2]) % _COLOUR_LEVELS == 1


def _draw_kinds(random: Random, num_screens: int, num_elements: int, stack_rate: float) -> Tensor:
    """Return the kinds of all boxes; frames fill their regions as list rows do."""
    kinds = random.integer(BUTTON, CHECK_BOX, num_screens, num_elements)
    stacked = random.uniform(num_screens, 1) < stack_rate
    kinds = torch.where(stacked, torch.full_like(kinds, LIST_ROW), kinds)
    return torch.cat([torch.full_like(kinds[:, :1], LIST_ROW).expand(-1, NUM_FRAMES), kinds], 1)


def _repeats(codes: Tensor) -> Tensor:
    """Return whether each name is that of an earlier box of its screen, so that an instruction would name both."""
    equal = (codes[:, :, None] == codes[:, None]).all(-1)
    return equal.tril(-1).any(-1)


def _window_boxes(random: Random, num_screens: int, style: ScreenStyle) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes of window and title bar, the height of the bar, and whether there is a window at all."""
    has_window = random.uniform(num_screens, 1) < style.window_rate
    extent = torch.tensor([style.width, style.height], device=has_window.device)
    size = (extent * (0.7 + 0.3 * random.uniform(num_screens, 2))).long()
    size = torch.where(has_window, size, extent)
    start = (random.uniform(num_screens, 2) * (extent - size + 1)).long()
    body = torch.cat([start, start + size], 1)
    bar_height = torch.where(has_window[:, 0], random.integer(18, 26, num_screens), 0)
    bar = body.clone()
    bar[:, 3] = body[:, 1] + bar_height
    return torch.stack([body, bar], 1), bar_height, has_window


def _draw_grid(random: Random, num_screens: int, style: ScreenStyle, held_out: bool) -> Tensor:
    """Return columns and rows per screen, all held out or none."""
    columns = random.integer(*style.columns, num_screens)
    rows = random.integer(*style.rows, num_screens)
    if held_out:  # the first number of rows from the lowest on, which may exceed the highest of a narrow range
        rows = style.rows[0] + (2 * columns - style.rows[0]) % _GRID_MODULUS
    else:
        shift = torch.where(rows > style.rows[0], -1, 1)
        rows = torch.where(is_held_out_grid(torch.stack([columns, rows], -1)), rows + shift, rows)
    return torch.stack([columns, rows], -1)


def _cells(random: Random, body: Tensor, bar_height: Tensor, grid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` different cells of each grid in random order, and whether the grid has as many."""
    most = 64
    order = random.uniform(len(grid), most)
    number = torch.arange(most, device=grid.device)
    num_cells = grid.prod(-1, keepdim=True)
    index = torch.where(number < num_cells, order, order + 1).argsort(1)[:, :count]
    columns, rows = grid[:, :1], grid[:, 1:]
    left, top = body[:, :1] + 3, body[:, 1:2] + bar_height[:, None] + 2
    width = (body[:, 2:3] - 3 - left) // columns
    height = (body[:, 3:4] - 3 - top) // rows
    x, y = left + (index % columns) * width, top + (index // columns) * height
    return torch.stack([x, y, x + width, y + height], -1), number[:count] < num_cells


def _per_screen(random: Random, values: Tensor, rate: float) -> Tensor:
    """Return values that are the same for all boxes of a screen, for this share of the screens."""
    same = random.uniform(len(values), *[1] * (values.ndim - 1)) < rate
    return torch.where(same, values[:, :1].expand_as(values), values)


def _place_boxes(random: Random, regions: Tensor, kinds: Tensor, text_width: Tensor, line_height: Tensor) -> Tensor:
    """Return the box of each element inside its cell; list rows and frames fill theirs."""
    room = regions[..., 2:] - regions[..., :2]
    least = torch.stack([text_width + 8 + _MARK_SPACE * (kinds == CHECK_BOX), line_height], -1)
    least = torch.minimum(least, room)
    spare = room - least
    grow = random.uniform(*spare.shape) ** 2
    size = least + (spare * grow * torch.tensor([0.9, 0.7], device=spare.device)).long()
    start = regions[..., :2] + (random.uniform(*spare.shape) * (room - size + 1)).long()
    placed = torch.cat([start, start + size], -1)
    return torch.where((kinds == LIST_ROW)[..., None], regions, placed)


def _place_text(
    random: Random, boxes: Tensor, kinds: Tensor, text_width: Tensor, line_height: Tensor
) -> tuple[Tensor, Tensor]:
    """Return where each text starts, and the square of each check box."""
    is_check_box = kinds == CHECK_BOX
    left = boxes[..., 0] + 4 + _MARK_SPACE * is_check_box
    spare = (boxes[..., 2] - 4 - left - text_width).clamp(min=0)
    centred = (kinds == BUTTON) | (_per_screen(random, random.uniform(*kinds.shape), 1.0) < 0.2)
    x = left + torch.where(centred & ~is_check_box, spare // 2, 0)
    middle = (boxes[..., 1] + boxes[..., 3]) // 2
    y = torch.maximum(middle - line_height // 2, boxes[..., 1])
    mark = torch.stack([boxes[..., 0] + 2, middle - _MARK_PIXELS // 2], -1)
    marks = torch.cat([mark, mark + _MARK_PIXELS], -1) * is_check_box[..., None]
    return torch.stack([x, y], -1), marks


def _draw_colours(random: Random, shape: tuple[int, ...], held_out: bool) -> Tensor:
    """Return fill colours, all held out or none; a third of those for training are nearly white or grey."""
    colour = random.uniform(*shape, 3)
    if not held_out:
        grey = 1 - 0.3 * random.uniform(*shape, 1) ** 2
        colour = torch.where(random.uniform(*shape, 1) < 0.35, grey.expand_as(colour), colour)
    level = (colour * _COLOUR_LEVELS).long().clamp(0, _COLOUR_LEVELS - 1)
    rest = colour * _COLOUR_LEVELS - level
    red = (1 - 3 * level[..., 1] - level[..., 2]) % _COLOUR_LEVELS
    if held_out:
        level[..., 0] = red
    else:
        level[..., 0] = torch.where(level[..., 0] == red, (red + 2) % _COLOUR_LEVELS, level[..., 0])
    return ((level + rest.clamp(0, 0.99)) / _COLOUR_LEVELS).clamp(0, 1)


def _element_colours(random: Random, kinds: Tensor, background: Tensor, has_window: Tensor, held_out: bool) -> Tensor:
    """Return fill, border and text colour of each box. Labels and check boxes have the colour of what is behind."""
    fill = _per_screen(random, _draw_colours(random, tuple(kinds.shape), held_out), 0.6)
    fill[:, :NUM_FRAMES] = _draw_colours(random, (len(kinds), NUM_FRAMES), held_out)
    behind = torch.where(has_window, fill[:, 0], background)[:, None].expand_as(fill)
    is_flat = (kinds == LABEL) | (kinds == CHECK_BOX)
    fill = torch.where(is_flat[..., None], behind, fill)
    border_style = random.uniform(*kinds.shape, 1)
    shade = (fill * (0.5 + 0.4 * random.uniform(*kinds.shape, 1))).clamp(0, 1)
    border = torch.where(border_style < 0.3, fill, shade)
    border = torch.where(is_flat[..., None], behind, border)
    return torch.stack([fill, border, _text_colours(random, fill)], 2)


def _text_colours(random: Random, fill: Tensor) -> Tensor:
    """Return text colours whose brightness differs from that of the fill by at least 0.35."""
    dark = fill.mean(-1, keepdim=True) > 0.5
    tint = random.uniform(*fill.shape)
    least = torch.where(dark, tint * 0.3, 1 - tint * 0.3)
    plain = torch.where(dark, 0.0, 1.0).expand_as(fill)
    free = random.uniform(*fill.shape)
    contrast = (free.mean(-1, keepdim=True) - fill.mean(-1, keepdim=True)).abs()
    style = random.uniform(*fill.shape[:-1], 1)
    colour = torch.where(style < 0.5, plain, least)
    return torch.where((style > 0.8) & (contrast > 0.4), free, colour)
