"""Token sequences of synthetic screens: instruction, screenshot and right answer, and which elements are targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deskrl.learner.pretraining.layouts import NUM_FRAMES, Layout, Random
from deskrl.learner.pretraining.names import CHARACTERS, MAX_LENGTH
from deskrl.learner.pretraining.policy_folder import (
    ANSWER_CLOSING,
    ANSWER_OPENING,
    ANSWER_SEPARATOR,
    LARGEST_NUMBER,
    SYSTEM_PROMPT,
)
from deskrl.learner.pretraining.rendering import PATCH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTIONS = (
    ("Click ", ""),
    ("Press ", ""),
    ("Select ", ""),
    ("Open ", ""),
    ("Click the ", " button"),
    ('Click "', '"'),
    ('Click on the "', '" button.'),
    ('Select "', '".'),
)
"""Parts of instructions before and after the name."""
MERGED = 2 * PATCH
"""Side in pixels of the part of a screen that one image token stands for."""
STEP = 7
"""Coordinates of answers are multiples of this number of pixels."""
_MIN_OVERLAP = 0.2


@dataclass(frozen=True)
class Sequences:
    """Token ids of a batch, without the image tokens between `before` and `after`."""

    before: Tensor
    """Tokens up to the start of the screenshot, padded on the left, with shape (screens, tokens)."""
    num_padding: Tensor
    """Number of padding tokens of each row of `before`."""
    after: Tensor
    """Tokens from the end of the screenshot to the end of the answer, with shape (screens, tokens)."""
    num_answer: int
    """Number of tokens of the answer, at the end of `after`."""


class SequenceBuilder:
    """Builds token sequences as the rendered prompts of the policy's conversations.

    Args:
        tokenizer: tokenizer of the policy.
        device: device of the tensors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def as_tensor(ids: list[int]) -> Tensor:
            return torch.tensor(ids, device=device)

        self._of_code = as_tensor([0, *(encode(character)[0] for character in CHARACTERS)])
        self.of_number = as_tensor([encode(str(number))[0] for number in range(LARGEST_NUMBER + 1)])
        self._opening = encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        self._instructions = [(encode(head), encode(tail)) for head, tail in INSTRUCTIONS]
        longest = max(len(head) + len(tail) for head, tail in self._instructions)
        self.num_before = len(self._opening) + longest + MAX_LENGTH + 1
        self._start = encode("<|vision_start|>")
        self._after = as_tensor(encode("<|vision_end|><|im_end|>\n<|im_start|>assistant\n"))
        self._answer_head = as_tensor(encode("".join(ANSWER_OPENING)))
        self._comma = as_tensor(encode(ANSWER_SEPARATOR))
        self._answer_tail = as_tensor(encode(f"{ANSWER_CLOSING}<|im_end|>"))
        self._padding = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self._templates = self._template_table(device)
        self.num_answer = len(self._answer_head) + 3 + len(self._answer_tail)
        self.x_place = len(self._answer_head)
        """Index of x in the answer; y is two tokens later."""

    def _template_table(self, device: torch.device) -> Tensor:
        """Return the tokens of each instruction: -1 for the characters of the name, -2 for padding."""
        rows = []
        for head, tail in self._instructions:
            row = [*self._opening, *head, *[-1] * MAX_LENGTH, *tail, *self._start]
            rows.append([-2] * (self.num_before - len(row)) + row)
        return torch.tensor(rows, device=device)

    def build(self, random: Random, names: Tensor, points: Tensor) -> Sequences:
        """Return the sequences of a batch.

        Args:
            random: random numbers, for the choice of instructions.
            names: codes of the named elements, with shape (screens, MAX_LENGTH).
            points: x and y of the answers in pixels, with shape (screens, 2).
        """
        row = self._templates[random.integer(0, len(self._templates) - 1, len(names))]
        is_name = row == -1
        place = (is_name.cumsum(1) - 1).clamp(min=0)
        characters = self._of_code[names].gather(1, place)
        kept = (row >= 0) | (is_name & (names.gather(1, place) > 0))
        ids = torch.where(is_name, characters, row)
        # A stable sort by `kept` moves what is left out to the front and keeps the order of the rest.
        order = kept.long().sort(dim=1, stable=True).indices
        ids = torch.where(kept, ids, torch.full_like(ids, self._padding)).gather(1, order)
        return Sequences(ids, (~kept).sum(1), self._with_answer(points), self.num_answer)

    def number(self, tokens: Tensor) -> Tensor:
        """Return the number that each token stands for, -1 if it is none."""
        match = tokens[:, None] == self.of_number
        return torch.where(match.any(1), match.float().argmax(1), -1)

    def _with_answer(self, points: Tensor) -> Tensor:
        numbers = self.of_number[points]
        columns = [self._after, self._answer_head, numbers[:, :1], self._comma, numbers[:, 1:], self._answer_tail]
        wide = [part if part.ndim == 2 else part.expand(len(points), -1) for part in columns]
        return torch.cat(wide, 1)


def choose_targets(random: Random, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the index of the named box of each screen, and whether the screen has an element at all."""
    drawn = layout.drawn[:, NUM_FRAMES:]
    order = random.uniform(*drawn.shape) + drawn
    return order.argmax(1) + NUM_FRAMES, drawn.any(1)


def point_targets(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Return the distribution of one coordinate of right answers: multiples of STEP inside the box, most in its middle.

    Args:
        low: first pixel of each box.
        high: pixel after the last of each box.
        size: width or height of the screen.

    Returns:
        Probabilities with shape (boxes, size / STEP + 1).
    """
    value = torch.arange(0, size + 1, STEP, device=low.device)
    middle, half = (low + high)[:, None] / 2, (high - low)[:, None] / 2
    weight = (1.02 - (value - middle).abs() / half).clamp(min=0).square()
    weight = torch.where((value >= low[:, None]) & (value < high[:, None]), weight, torch.zeros_like(weight))
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-9)


def target_cells(boxes: Tensor, width: int, height: int) -> Tensor:
    """Return which image tokens belong to a box: a fifth of their area, or the middle of the box, is inside.

    Args:
        boxes: pixels (left, top, right, bottom), with shape (screens, 4).
        width: width of the screens in pixels.
        height: height of the screens in pixels.

    Returns:
        Booleans with shape (screens, height / MERGED, width / MERGED).
    """
    x = torch.arange(0, width, MERGED, device=boxes.device)
    y = torch.arange(0, height, MERGED, device=boxes.device)
    left, top, right, bottom = boxes[..., None].unbind(1)
    overlap_x = (torch.minimum(x + MERGED, right) - torch.maximum(x, left)).clamp(min=0)
    overlap_y = (torch.minimum(y + MERGED, bottom) - torch.maximum(y, top)).clamp(min=0)
    is_large = overlap_y[:, :, None] * overlap_x[:, None] >= _MIN_OVERLAP * MERGED**2
    has_x = (left + right) // 2 // MERGED == x // MERGED
    has_y = (top + bottom) // 2 // MERGED == y // MERGED
    return is_large | (has_y[:, :, None] & has_x[:, None])


def merge_order(grid: Tensor) -> Tensor:
    """Return values of patches (screens, rows, columns, ...) in the order in which the processor lists patches."""
    num_screens, rows, columns, *rest = grid.shape
    blocks = grid.reshape(num_screens, rows // 2, 2, columns // 2, 2, *rest).transpose(2, 3)
    return blocks.reshape(num_screens, rows * columns, *rest)
