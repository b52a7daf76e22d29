"""Synthetic screens of pretraining: names, layouts, pictures and reading targets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deskrl.core.errors import UserError
from deskrl.learner.pretraining.glyph_atlas import GlyphAtlas, build_atlas
from deskrl.learner.pretraining.layouts import (
    NUM_FRAMES,
    Layout,
    Random,
    draw_layout,
    fit_text,
    is_held_out_colour,
    is_held_out_grid,
)
from deskrl.learner.pretraining.names import (
    MAX_LENGTH,
    SPACE,
    NameStyle,
    draw_names,
    is_held_out,
    name_codes,
    name_text,
)
from deskrl.learner.pretraining.rendering import PATCH, SLOTS, render
from deskrl.learner.pretraining.screen_curriculum import FONT_SIZES, LEVELS

LARGE = LEVELS[-1].style


@pytest.fixture(scope="module")
def atlas() -> GlyphAtlas:
    return build_atlas(["DejaVuSans.ttf", "DejaVuSansMono.ttf"], FONT_SIZES, torch.device("cpu"))


def random(seed: int = 0) -> Random:
    return Random(torch.Generator().manual_seed(seed))


def one_button(text: str, atlas: GlyphAtlas, left: int, top: int) -> Layout:
    """Return a white button of 84 x 28 pixels with black monospaced text of 14 pixels, on a grey desktop."""
    codes = torch.zeros(1, 1, MAX_LENGTH, dtype=torch.long)
    codes[0, 0, : len(text)] = torch.tensor(name_codes(text))
    white, black = torch.ones(3), torch.zeros(3)
    return Layout(
        boxes=torch.tensor([[[left, top, left + 84, top + 28]]]),
        drawn=torch.tensor([[True]]),
        colours=torch.stack([white, black, black])[None, None],
        marks=torch.zeros(1, 1, 4, dtype=torch.long),
        codes=codes,
        text_at=torch.tensor([[[left + 7, top + 6]]]),
        fonts=torch.tensor([[1]]),
        sizes=torch.tensor([[FONT_SIZES.index(14)]]),
        background=torch.full((1, 3), 0.5),
        grid=torch.tensor([[1, 1]]),
    )


def test_codes_and_text_of_a_name_correspond() -> None:
    assert name_text(torch.tensor([*name_codes("Save as9"), 0, 0])) == "Save as9"


@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_names_are_all_held_out_or_none(held_out: bool) -> None:
    names = draw_names(random().generator, 64, 20, NameStyle(similar_rate=0.3), held_out)
    assert is_held_out(names).tolist() == [[held_out] * 20] * 64


def test_held_out_names_are_told_by_their_first_three_letters_in_any_case() -> None:
    name = draw_names(random().generator, 1, 1, NameStyle(), True)[0, 0]
    text = name_text(name)[:3]
    assert all(bool(is_held_out(torch.tensor(name_codes(other)))) for other in (text.lower(), text.upper() + "xyz"))


def test_names_have_the_lengths_of_their_style_and_no_two_adjacent_digits() -> None:
    names = draw_names(random().generator, 64, 20, NameStyle(4, 7, digit_rate=0.8), False)
    lengths = (names > 0).sum(-1)
    assert (int(lengths.min()), int(lengths.max())) == (4, 7)
    digits = torch.tensor([[c.isdigit() for c in name_text(name).ljust(MAX_LENGTH)] for name in names.flatten(0, 1)])
    assert bool(digits.any())
    assert not bool((digits[:, 1:] & digits[:, :-1]).any())


def test_similar_names_differ_within_their_first_three_letters_only() -> None:
    names = draw_names(random().generator, 64, 8, NameStyle(6, 6, 0.0, 0.0, similar_rate=1.0), False)
    differs = (names - 1) % 26 != (names[:, :1] - 1) % 26
    assert bool(differs[:, 1:, :3].any(-1).float().mean() > 0.9)
    assert not bool(differs[..., 3:].any())


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_grids_and_fill_colours_are_all_held_out_or_none(atlas: GlyphAtlas, level: object, held_out: bool) -> None:
    layout = draw_layout(random(), 64, level.style, atlas, held_out)  # type: ignore[attr-defined]
    assert is_held_out_colour(layout.colours[:, :, 0]).tolist() == [[held_out] * layout.drawn.shape[1]] * 64
    assert is_held_out_grid(layout.grid).tolist() == [held_out] * 64


def test_elements_lie_on_the_screen_and_do_not_overlap(atlas: GlyphAtlas) -> None:
    layout = draw_layout(random(), 64, LARGE, atlas, False)
    boxes, drawn = layout.boxes[:, NUM_FRAMES:], layout.drawn[:, NUM_FRAMES:]
    left, top, right, bottom = boxes.unbind(-1)
    assert bool(((left >= 0) & (top >= 0) & (right <= LARGE.width) & (bottom <= LARGE.height))[drawn].all())
    apart = (
        (left[:, :, None] >= right[:, None])
        | (right[:, :, None] <= left[:, None])
        | (top[:, :, None] >= bottom[:, None])
        | (bottom[:, :, None] <= top[:, None])
    )
    both = drawn[:, :, None] & drawn[:, None] & ~torch.eye(drawn.shape[1], dtype=torch.bool)
    assert bool(apart[both].all())


def test_no_two_elements_of_a_screen_have_the_same_name(atlas: GlyphAtlas) -> None:
    style = replace(LARGE, names=NameStyle(3, 3, similar_rate=1.0))
    layout = draw_layout(random(), 64, style, atlas, False)
    for names, drawn in zip(layout.codes, layout.drawn, strict=True):
        texts = [name_text(name) for name in names[drawn] if bool(name.any())]
        assert len(set(texts)) == len(texts)


def test_text_stays_inside_its_element(atlas: GlyphAtlas) -> None:
    layout = draw_layout(random(), 64, LARGE, atlas, False)
    width = atlas.advances[layout.fonts[..., None], layout.sizes[..., None], layout.codes].sum(-1)
    inside = (layout.text_at[..., 0] >= layout.boxes[..., 0]) & (layout.text_at[..., 0] + width <= layout.boxes[..., 2])
    assert bool(inside[layout.drawn].all())


def test_text_that_does_not_fit_gets_smaller_before_it_gets_shorter(atlas: GlyphAtlas) -> None:
    codes = torch.tensor([[[*name_codes("Save as"), 0]] * 3])
    fonts, largest = torch.ones(1, 3, dtype=torch.long), torch.full((1, 3), len(FONT_SIZES) - 1)
    room = torch.tensor([[200, 60, 40]])
    sizes, kept, widths = fit_text(codes, fonts, largest, room, torch.full((1, 3), 40), atlas)
    assert [name_text(name) for name in kept[0]] == ["Save as", "Save as", "Save"]
    assert int(sizes[0, 0]) > int(sizes[0, 1]) >= int(sizes[0, 2]) == 0
    assert bool((widths <= room).all())


def test_a_button_is_drawn_with_border_fill_and_text(atlas: GlyphAtlas) -> None:
    picture, _ = render(one_button("Save", atlas, 14, 28), 112, 84, atlas, random())
    assert picture.shape == (1, 3, 84, 112)
    grey = picture[0, 0]
    assert float(grey[5, 5]) == pytest.approx(0.5, abs=0.02)  # desktop
    assert float(grey[28, 50]) == pytest.approx(0.0, abs=0.02)  # border
    assert float(grey[31, 16]) == pytest.approx(1.0, abs=0.02)  # fill
    assert float(grey[34:50, 21:60].min()) < 0.2  # text


def test_the_reading_target_is_the_character_over_the_middle_of_each_slot(atlas: GlyphAtlas) -> None:
    layout = one_button("Ab c", atlas, 14, 28)
    advance = int(atlas.advances[1, FONT_SIZES.index(14), 1])  # the same for all characters
    _, targets = render(layout, 112, 84, atlas, random())
    left = int(layout.text_at[0, 0, 0])
    expected = []
    for slot in range(112 // PATCH * SLOTS):
        index = int(((slot + 0.5) * PATCH / SLOTS - left) // advance)
        code = name_codes("Ab c")[index] if 0 <= index < 4 else 0
        expected.append(0 if code == SPACE else code)
    rows_with_text = [row.tolist() for row in targets[0] if bool(row.any())]
    assert rows_with_text == [expected, expected]  # the line of 17 pixels covers the middles of two rows of patches


def test_what_is_not_drawn_has_neither_pixels_nor_targets(atlas: GlyphAtlas) -> None:
    layout = replace(one_button("Save", atlas, 14, 28), drawn=torch.tensor([[False]]))
    picture, targets = render(layout, 112, 84, atlas, random())
    assert float((picture - 0.5).abs().max()) < 0.02
    assert not bool(targets.any())


def test_a_missing_font_is_reported_by_name() -> None:
    with pytest.raises(UserError, match=r"font Missing\.ttf not found"):
        build_atlas(["Missing.ttf"], [12], torch.device("cpu"))
