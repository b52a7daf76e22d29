"""Curriculum of pretraining: from dense text on small screens to windows with many elements on large ones."""

from __future__ import annotations

from dataclasses import dataclass

from deskrl.learner.pretraining.layouts import ScreenStyle
from deskrl.learner.pretraining.names import NameStyle

FONT_SIZES = (11, 12, 13, 14, 16, 18, 20, 24)
"""Font sizes in pixels; styles refer to their indices."""


@dataclass(frozen=True)
class Level:
    """One level of the curriculum."""

    name: str
    style: ScreenStyle
    batch_scale: float
    """Screens per optimizer step, as a multiple of `batch_size` of the configuration."""
    most_share: float
    """The level ends after this share of the training at the latest."""
    is_reading: bool = False
    """Whether only the vision tower is trained, on reading."""
    pass_rate: float = 1.0
    """The level ends early at this accuracy: of reading, or of clicks on the named element."""


_SMALL = (252, 140)
_LARGE = (504, 280)
_ALL_SIZES = (0, 7)

LEVELS = (
    Level(
        "read large text",
        ScreenStyle(*_SMALL, (2, 3), (4, 6), (18, 18), (4, 7), window_rate=0.1, stack_rate=0.5),
        1.5,
        0.06,
        is_reading=True,
        pass_rate=0.8,
    ),
    Level(
        "read all sizes",
        ScreenStyle(*_SMALL, (2, 4), (4, 8), (32, 32), _ALL_SIZES, window_rate=0.1, stack_rate=0.5),
        1.5,
        0.14,
        is_reading=True,
        pass_rate=0.93,
    ),
    Level(
        "find one of two",
        ScreenStyle(*_SMALL, (1, 2), (2, 3), (1, 2), (2, 7), NameStyle(3, 6), window_rate=0.2),
        2.0,
        0.15,
        pass_rate=0.85,
    ),
    Level(
        "find one of six",
        ScreenStyle(*_SMALL, (1, 3), (2, 5), (2, 6), _ALL_SIZES, NameStyle(3, 10), window_rate=0.3),
        2.0,
        0.2,
        pass_rate=0.85,
    ),
    Level(
        "find on large screens",
        ScreenStyle(*_LARGE, (1, 4), (2, 7), (2, 12), _ALL_SIZES, NameStyle(3, 12, similar_rate=0.1)),
        0.625,
        1.0,
    ),
)
"""Levels in order; the last one lasts until the end of the training."""


def next_level(index: int, accuracy: float, share_of_level: float) -> int:
    """Return the index of the level that follows.

    Args:
        index: current level.
        accuracy: recent accuracy on the current level.
        share_of_level: share of the training spent on the current level.
    """
    level = LEVELS[index]
    is_last = index == len(LEVELS) - 1
    return index if is_last or (accuracy < level.pass_rate and share_of_level < level.most_share) else index + 1


def learning_rate_scale(step: int, progress: float, warmup_steps: int, decay_share: float) -> float:
    """Return the factor of the learning rate: rises linearly, is constant, and falls to 2 % at the end.

    Args:
        step: number of optimizer steps so far.
        progress: share of the training that is over.
        warmup_steps: steps over which the factor rises.
        decay_share: share of the training over which the factor falls.
    """
    rise = min(1.0, (step + 1) / warmup_steps)
    fall = min(1.0, max(0.02, (1 - progress) / decay_share))
    return rise * fall
