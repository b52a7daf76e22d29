"""Image in the observation of an OpenEnv server, which has no type of its own for images."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from deskrl.actor.image_decoding import MAX_PIXELS, ImageError, decode_image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode_observation_image(observation: Mapping[str, Any], image_key: str, shape_key: str = "") -> Image.Image:
    """Return the image of an observation as RGB.

    Args:
        observation: fields of the observation.
        image_key: key of the image: a PNG or JPEG file in base64, also as a data URL; or nested arrays of the shape
            (height, width) or (height, width, channels), with 1, 3 or 4 channels of integers from 0 to 255.
        shape_key: key of the shape of an image that is a flat array; empty: it is not flat.

    Raises:
        ImageError: the observation does not have this key, or its value is not an image.
    """
    if image_key not in observation:
        raise ImageError(f"the observation has no {image_key!r}, but {', '.join(observation) or 'nothing'}")
    value = observation[image_key]
    if isinstance(value, str):
        try:
            return decode_image(base64.b64decode(value.rpartition("base64,")[2], validate=True))
        except binascii.Error as error:
            raise ImageError(f"{image_key} is not an image in base64") from error
    if not isinstance(value, list) or not value:
        raise ImageError(f"{image_key} is neither an image in base64 nor an array")
    try:
        return _from_array(value, _shape(value, observation[shape_key] if shape_key else None))
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"{image_key} is not an array of pixels: {type(error).__name__}: {error}") from error


def _shape(value: Sequence[Any], shape: Any) -> tuple[int, int, int]:
    """Return height, width and number of channels."""
    if shape is None:
        first = value[0][0]
        shape = (len(value), len(value[0]), *([len(first)] if isinstance(first, list) else []))
    height, width, num_channels = (*shape, 1) if len(shape) == 2 else shape
    if num_channels not in _MODES or not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"the shape {tuple(shape)} is not that of an image")
    return height, width, num_channels


def _from_array(value: Sequence[Any], shape: tuple[int, int, int]) -> Image.Image:
    while isinstance(value[0], list):
        value = list(itertools.chain.from_iterable(value))
    height, width, num_channels = shape
    if len(value) != height * width * num_channels:
        raise ValueError(f"{len(value)} values for the shape {shape}")
    return Image.frombytes(_MODES[num_channels], (width, height), bytes(value)).convert("RGB")
