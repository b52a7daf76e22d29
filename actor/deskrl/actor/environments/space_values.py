"""Values of Gymnasium's action spaces from templates and gestures.

Coordinates are scaled from pixels of the environment's image to the range of the component in which their placeholder
stands: the bounds of a Box, or the numbers of a Discrete or MultiDiscrete space. In a Box without bounds they remain
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from deskrl.actor.environments.gestures import HORIZONTAL, VERTICAL, Gesture, placeholder, placeholders

_POINTER_SHAPE = (2,)


class SpaceError(ValueError):
    """A template does not fit an action space, or a space cannot be mapped."""


def default_table(space: spaces.Space[Any]) -> dict[str, Any]:
    """Return the templates of a space whose meaning is evident: texts, and bounded points; otherwise none."""
    if isinstance(space, spaces.Text):
        return {"type": "{text}"}
    if isinstance(space, spaces.Box) and space.shape == _POINTER_SHAPE and space.is_bounded():
        return {"click": ["{x}", "{y}"]}
    return {}


def check_table(space: spaces.Space[Any], table: Mapping[str, Any]) -> None:
    """Raise SpaceError if the table is empty, or a template in it is not an action of the space."""
    if not table:
        raise SpaceError(f"the action space {space} needs a table of actions")
    for name, template in table.items():
        values = {key: "" if key == "text" else 0 for key in placeholders(template)}
        try:
            value = _value(space, template, Gesture(name, values, (1, 1)), is_probe=True)
        except (SpaceError, OverflowError) as error:
            raise SpaceError(f"actions: {name}: {error}") from error
        if not space.contains(value):
            raise SpaceError(f"actions: {name}: {template!r} is not in the action space {space}")


def action_value(space: spaces.Space[Any], template: Any, gesture: Gesture) -> Any | None:
    """Return the action of a gesture; None if the space does not contain it, such as a text that is too long.

    Args:
        space: action space for which `check_table` accepted the template.
        template: template of the gesture.
        gesture: gesture of the policy.
    """
    try:
        value = _value(space, template, gesture)
    except OverflowError:
        return None
    return value if space.contains(value) else None


def _value(space: spaces.Space[Any], template: Any, gesture: Gesture, is_probe: bool = False) -> Any:
    match space:
        case spaces.Dict():
            if not isinstance(template, Mapping) or template.keys() != space.spaces.keys():
                raise SpaceError(f"{template!r} must be a table with the keys {', '.join(map(str, space.spaces))}")
            return {key: _value(part, template[key], gesture, is_probe) for key, part in space.spaces.items()}
        case spaces.Tuple():
            if not isinstance(template, list | tuple) or len(template) != len(space.spaces):
                raise SpaceError(f"{template!r} must be an array of {len(space.spaces)} values")
            return tuple(_value(part, item, gesture, is_probe) for part, item in zip(space, template, strict=True))
        case spaces.Text():
            if (name := placeholder(template)) is None:
                return template
            return space.sample() if is_probe else gesture.values[name]
        case spaces.Discrete():
            return np.int64(_cell(template, gesture, int(space.start), int(space.n)))
        case spaces.MultiDiscrete():
            cells = zip(space.start.flat, space.nvec.flat, _items(template, space.shape), strict=True)
            values = [_cell(item, gesture, int(start), int(num)) for start, num, item in cells]
            return np.array(values, space.dtype).reshape(space.shape)
        case spaces.MultiBinary():
            values = [_cell(item, gesture, 0, 2) for item in _items(template, space.shape)]
            return np.array(values, space.dtype).reshape(space.shape)
        case spaces.Box():
            bounds = zip(space.low.flat, space.high.flat, _items(template, space.shape), strict=True)
            numbers = [_number(item, gesture, float(low), float(high)) for low, high, item in bounds]
            array = np.array(numbers, np.float64).reshape(space.shape)
            if ((array < space.low) | (array > space.high)).any():
                return array  # which the space does not contain; the conversion to its type could wrap around
            return (np.rint(array) if np.issubdtype(space.dtype, np.integer) else array).astype(space.dtype)
    raise SpaceError(f"the action space {space} cannot be mapped")


def _items(template: Any, shape: tuple[int, ...]) -> list[Any]:
    """Return the items of nested arrays of a shape; a single value stands for all items."""
    if not isinstance(template, list | tuple):
        return [template] * math.prod(shape)
    if not shape or len(template) != shape[0]:
        raise SpaceError(f"{template!r} must have the shape {shape}")
    if len(shape) == 1:
        return list(template)
    return [item for row in template for item in _items(row, shape[1:])]


def _cell(item: Any, gesture: Gesture, start: int, num: int) -> int:
    """Return an integer from `start` to `start + num - 1`: the cell of a coordinate, or the value itself."""
    name = placeholder(item)
    if name is None:
        if type(item) is not int:
            raise SpaceError(f"{item!r} must be an integer")
        return item
    raw = _raw(name, gesture)
    length = _length(name, gesture)
    return int(raw) if length is None else start + int(raw) * num // length


def _number(item: Any, gesture: Gesture, low: float, high: float) -> float:
    """Return a number: a coordinate scaled to the bounds if they are finite, or the value itself."""
    name = placeholder(item)
    if name is None:
        if type(item) not in (int, float):
            raise SpaceError(f"{item!r} must be a number")
        return float(item)
    raw = _raw(name, gesture)
    length = _length(name, gesture)
    if length is None or not (math.isfinite(low) and math.isfinite(high)):
        return raw
    return low + (high - low) * raw / max(1, length - 1)


def _raw(name: str, gesture: Gesture) -> float:
    value = gesture.values[name]
    if isinstance(value, str):
        raise SpaceError(f"{{{name}}} must be in a space of texts")
    return float(value)


def _length(name: str, gesture: Gesture) -> int | None:
    """Return the number of pixels in the direction of a coordinate; None for other values."""
    width, height = gesture.image_size
    return width if name in HORIZONTAL else height if name in VERTICAL else None
