"""Evaluation of the policy on synthetic screens: greedy answers in the action language, and reading."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from deskrl.learner.pretraining.answer_sequences import SequenceBuilder
from deskrl.learner.pretraining.batched_forward import BatchedForward
from deskrl.learner.pretraining.batches import Batch, BatchSource
from deskrl.learner.pretraining.layouts import ScreenStyle
from deskrl.learner.pretraining.pretrain_losses import DenseHeads, hits, reading_loss

_BATCH_SIZE = 128


@dataclass(frozen=True)
class SightResult:
    """Result on screens of one distribution."""

    num_screens: int
    """Number of screens with at least one element."""
    hit: float
    """Share of the screens on which the greedy answer is a click on the named element."""
    chance: float
    """Share on which a click on a random element would be."""
    read: float
    """Share of the visible character slots that are read."""

    def as_json(self) -> dict[str, float]:
        """Return the values, rounded to four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Evaluator:
    """Evaluates one model.

    Args:
        forward: forward pass of the model, not compiled.
        heads: dense heads.
        builder: builds token sequences.
        source: source of screens.
    """

    def __init__(
        self, forward: BatchedForward, heads: DenseHeads, builder: SequenceBuilder, source: BatchSource
    ) -> None:
        self._forward = forward
        self._heads = heads
        self._builder = builder
        self._source = source

    @torch.no_grad()
    def evaluate(self, style: ScreenStyle, num_screens: int, held_out: bool) -> SightResult:
        """Draw and evaluate at least `num_screens` screens; `held_out` as in `BatchSource.draw`."""
        size = min(_BATCH_SIZE, num_screens)
        num_batches = -(-num_screens // size)
        hit = chance = weight = read = 0.0
        for _ in range(num_batches):
            batch = self._source.draw(style, size, held_out)
            good, share_read = self._answer(batch)
            hit += float((good * batch.answers.weight).sum())
            chance += float((batch.answers.weight / batch.num_elements.clamp(min=1)).sum())
            weight += float(batch.answers.weight.sum())
            read += share_read / num_batches
        return SightResult(round(weight), hit / max(1.0, weight), chance / max(1.0, weight), read)

    def _answer(self, batch: Batch) -> tuple[Tensor, float]:
        """Return whether each greedy answer is right, and the share of characters that are read."""
        after = batch.sequences.after
        start = after.shape[1] - batch.sequences.num_answer
        places = (self._builder.x_place, self._builder.x_place + 2)
        right = after[:, start:].clone()
        for place in places:  # y depends on the chosen x
            hidden = self._forward(batch.pictures, batch.sequences)
            after[:, start + place] = self._forward.logits(hidden.answer)[:, place].argmax(-1)
        hidden = self._forward(batch.pictures, batch.sequences)
        written = self._forward.logits(hidden.answer).argmax(-1)
        is_right = written == right
        is_right[:, list(places)] = True
        x, y = (self._builder.number(written[:, place]) for place in places)
        head = self._heads.characters
        _, read = reading_loss(hidden.patches, head.weight, head.bias, batch.characters)
        return hits(x, y, batch.answers.boxes) & is_right.all(1), float(read)
