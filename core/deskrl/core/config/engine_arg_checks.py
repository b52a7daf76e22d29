"""Checks of the numbers in `inference.engine_args`, whose names and types vLLM itself checks when it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_NUMBER = 2**53
_POSITIVE = frozenset({"block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens", "nnodes"})
"""Names of arguments that are whole numbers from 1, in addition to all that end in `_parallel_size`."""
_MAX_WORKERS = 1024
_MINUS_ONE = frozenset({"max_logprobs", "max_model_len"})
"""Names of arguments for which vLLM gives -1 a meaning."""


def check_engine_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's engine arguments.

    Raises:
        ValueError: a number is not finite, negative, or too large.
    """
    for name, value in arguments.items():
        is_size = name.endswith("_parallel_size")
        if value is not None and (is_size or name in _POSITIVE):
            limit = _MAX_WORKERS if is_size else 2**31 - 1
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {_shown(value)}")
        for number in _numbers(value):
            if not math.isfinite(number) or abs(number) > _MAX_NUMBER:
                raise ValueError(f"{name} must be a finite number, not {_shown(number)}")
            if number < 0 and number is value and not (number == -1 and name in _MINUS_ONE):
                raise ValueError(f"{name} must not be negative, not {_shown(number)}")
    return dict(arguments)


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield all numbers in a value and in the tables and lists that it contains."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def _shown(value: Any) -> str:
    """Return a value for a message, cut to a few words."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "a number with too many digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
