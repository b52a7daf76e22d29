"""Disk that a run's checkpoints take. Pure arithmetic over a shape; knows no disk."""

from __future__ import annotations

from deskrl.core.config import LearnerConfig
from deskrl.core.explain.memory import bytes_per_number
from deskrl.core.explain.shape import ModelShape

_STATE_BYTES = 12
"""Of a parameter that is trained: master weight and two moments, in float32."""


def checkpoint_bytes(learner: LearnerConfig, shape: ModelShape) -> int:
    """One checkpoint: the model that others load, and the engine's own weights and optimizer states, of all ranks."""
    trained = shape.num_language_parameters if learner.freeze_vision else shape.num_parameters
    return 2 * bytes_per_number(learner.dtype) * shape.num_parameters + _STATE_BYTES * trained


def most_checkpoints(learner: LearnerConfig) -> int:
    """How many there are at most: those that are kept, and the one that is being written."""
    return learner.keep_checkpoints + 1
