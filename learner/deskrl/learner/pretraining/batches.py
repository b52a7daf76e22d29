"""Batches of synthetic screens with instructions, right answers and dense targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deskrl.learner.pretraining.answer_sequences import (
    STEP,
    SequenceBuilder,
    Sequences,
    choose_targets,
    merge_order,
    point_targets,
    target_cells,
)
from deskrl.learner.pretraining.glyph_atlas import GlyphAtlas
from deskrl.learner.pretraining.layouts import NUM_FRAMES, Random, ScreenStyle, draw_layout
from deskrl.learner.pretraining.pretrain_losses import Answers
from deskrl.learner.pretraining.rendering import SLOTS, render


@dataclass(frozen=True)
class Batch:
    """One batch of screens."""

    pictures: Tensor
    """Colours from 0 to 1, with shape (screens, 3, height, width)."""
    characters: Tensor
    """Reading targets in the order of the processor, with shape (screens, patches, SLOTS)."""
    sequences: Sequences
    cells: Tensor
    """Whether each image token belongs to the named element, with shape (screens, rows, columns)."""
    answers: Answers
    num_elements: Tensor
    """Number of elements of each screen."""

    def split(self, size: int) -> list[Batch]:
        """Return the batch in parts of `size` screens."""
        sequences, answers = self.sequences, self.answers
        return [
            Batch(
                self.pictures[part],
                self.characters[part],
                Sequences(
                    sequences.before[part], sequences.num_padding[part], sequences.after[part], sequences.num_answer
                ),
                self.cells[part],
                Answers(answers.x[part], answers.y[part], answers.boxes[part], answers.weight[part]),
                self.num_elements[part],
            )
            for part in (slice(start, start + size) for start in range(0, len(self.pictures), size))
        ]


class BatchSource:
    """Endless source of batches.

    Args:
        builder: builds token sequences.
        atlas: glyphs.
        random: random numbers, which determine the screens.
    """

    def __init__(self, builder: SequenceBuilder, atlas: GlyphAtlas, random: Random) -> None:
        self._builder = builder
        self._atlas = atlas
        self._random = random

    @torch.no_grad()
    def draw(self, style: ScreenStyle, num_screens: int, held_out: bool) -> Batch:
        """Draw a batch.

        Args:
            style: distribution of the screens.
            num_screens: number of screens.
            held_out: whether names, grids and fill colours are held-out ones, or never.
        """
        layout = draw_layout(self._random, num_screens, style, self._atlas, held_out)
        pictures, characters = render(layout, style.width, style.height, self._atlas, self._random)
        characters = merge_order(characters.view(num_screens, characters.shape[1], -1, SLOTS))
        target, has_target = choose_targets(self._random, layout)
        screen = torch.arange(num_screens, device=target.device)
        boxes = layout.boxes[screen, target]
        x = point_targets(boxes[:, 0], boxes[:, 2], style.width)
        y = point_targets(boxes[:, 1], boxes[:, 3], style.height)
        points = torch.stack([self._sample(x), self._sample(y)], 1) * STEP
        sequences = self._builder.build(self._random, layout.codes[screen, target], points)
        answers = Answers(x, y, boxes, has_target.float())
        cells = target_cells(boxes, style.width, style.height)
        return Batch(pictures, characters, sequences, cells, answers, layout.drawn[:, NUM_FRAMES:].sum(1))

    def _sample(self, probabilities: Tensor) -> Tensor:
        # A screen without an element has no right answer, but needs some token.
        return torch.multinomial(probabilities + 1e-9, 1, generator=self._random.generator)[:, 0]
