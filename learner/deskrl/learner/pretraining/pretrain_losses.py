"""Losses of pretraining: reading, finding and answering, and the dense heads, which the policy does not keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deskrl.learner.pretraining.names import NUM_CLASSES
from deskrl.learner.pretraining.rendering import SLOTS

_BLANK_WEIGHT = 0.1
"""Weight of slots without a character, which are most of them."""
_POSITIVE_WEIGHT = 4.0
"""Weight of image tokens that belong to the named element, which are few."""
NUM_PLACES = 64
"""Most columns and rows of image tokens of a screen."""


class DenseHeads(nn.Module):
    """Linear predictions from hidden states of vision blocks and language layers.

    Args:
        vision_width: width of the vision tower.
        text_width: width of the language model.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(vision_width, SLOTS * NUM_CLASSES)
        self.places = nn.Linear(text_width, 1 + 2 * NUM_PLACES)


@dataclass(frozen=True)
class Answers:
    """Right answers of a batch."""

    x: Tensor
    """Probabilities of the horizontal coordinate, as `point_targets` returns them."""
    y: Tensor
    boxes: Tensor
    """Boxes of the named elements in pixels."""
    weight: Tensor
    """1 for screens with an element, otherwise 0, with shape (screens,)."""


def reading_loss(patches: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of reading and the share of characters that are read.

    Args:
        patches: outputs of the vision blocks, with shape (screens, patches, width).
        weight: weight of the head of characters.
        bias: bias of the head of characters.
        targets: codes with shape (screens, patches, SLOTS).
    """
    logits = F.linear(patches, weight.to(patches.dtype), bias.to(patches.dtype)).view(-1, NUM_CLASSES).float()
    target = targets.flatten()
    is_visible = (target > 0).float()
    importance = is_visible + _BLANK_WEIGHT * (1 - is_visible)
    loss = F.cross_entropy(logits, target, reduction="none")
    accuracy = ((logits.argmax(-1) == target).float() * is_visible).sum() / is_visible.sum().clamp(min=1)
    return (loss * importance).sum() / importance.sum(), accuracy


def finding_loss(cells: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, screens: Tensor) -> Tensor:
    """Return the loss of marking the image tokens of the named element, and of naming each image token's place.

    Args:
        cells: hidden states of image tokens, with shape (screens, image tokens, width).
        weight: weight of the head of places.
        bias: bias of the head of places.
        targets: booleans with shape (screens, rows, columns).
        screens: weight of each screen.
    """
    outputs = F.linear(cells, weight.to(cells.dtype), bias.to(cells.dtype)).float()
    rows, columns = targets.shape[1:]
    label = targets.flatten(1).float()
    importance = (1 + (_POSITIVE_WEIGHT - 1) * label) * screens[:, None]
    marks = F.binary_cross_entropy_with_logits(outputs[..., 0], label, reduction="none")
    loss = (marks * importance).sum() / importance.sum().clamp(min=1)
    index = torch.arange(rows * columns, device=cells.device).expand(len(cells), -1).flatten()
    column = F.cross_entropy(outputs[..., 1 : 1 + NUM_PLACES].flatten(0, 1), index % columns)
    row = F.cross_entropy(outputs[..., 1 + NUM_PLACES :].flatten(0, 1), index // columns)
    return loss + 0.1 * (column + row)


def answer_loss(
    logits: Tensor, tokens: Tensor, places: tuple[int, int], numbers: tuple[Tensor, Tensor], answers: Answers
) -> Tensor:
    """Return the cross-entropy of the answers; the target of a coordinate is a distribution.

    Args:
        logits: logits with shape (screens, tokens of the answer, vocabulary).
        tokens: token ids of the answers.
        places: indices of x and y in the answer.
        numbers: token ids of the values of x and of y.
        answers: right answers.
    """
    logprobs = logits.float().log_softmax(-1)
    x = -(logprobs[:, places[0]][:, numbers[0]] * answers.x).sum(-1)
    y = -(logprobs[:, places[1]][:, numbers[1]] * answers.y).sum(-1)
    fixed = -logprobs.gather(2, tokens[..., None]).squeeze(2)
    fixed[:, list(places)] = 0.0
    weight = answers.weight / answers.weight.sum().clamp(min=1)
    return ((x + y + fixed.sum(1)) * weight).sum()


def hits(x: Tensor, y: Tensor, boxes: Tensor) -> Tensor:
    """Return whether points lie inside boxes."""
    left, top, right, bottom = boxes.unbind(-1)
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def initialise_(model: Any, depth: int) -> None:
    """Scale down the matrices that write to the residual stream, so that its size does not grow with the depth."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn.proj.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * depth) ** -0.5)
