"""Decoding of images from desktops, bounded in format, pixels and time, in threads beside the event loop.

The bytes may come from the policy. Decoding one image of the largest allowed size needs about 270 MB (four bytes per
pixel, once more after the conversion to RGB), and at most `NUM_THREADS` images are decoded at the same time.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Collection
from typing import TypeVar

from PIL import Image

from deskrl.actor.thread_pool import ThreadPool

MAX_PIXELS = 7680 * 4320
"""Largest number of pixels of an image that is decoded: a screen of 8K."""
DEFAULT_FORMATS = ("PNG", "JPEG")
"""Formats that are decoded unless a task names others."""
OPTIONAL_FORMATS = ("BMP", "GIF", "TIFF", "WEBP")
"""Raster formats that a task may name; no decoder of theirs starts a program."""
NUM_THREADS = 4
"""Largest number of images that are decoded at the same time."""
# Each scan of a progressive JPEG costs a pass over all pixels, but only a few bytes. Encoders write about ten.
_MAX_JPEG_SCANS = 25
_PNG_END = b"IEND\xaeB`\x82"

_T = TypeVar("_T")

_threads = ThreadPool(NUM_THREADS, "decode")


class ImageError(ValueError):
    """The bytes are not a complete image of an allowed format and size."""


def decode_image(data: bytes, formats: Collection[str] = DEFAULT_FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image as RGB. Format and dimensions are checked before any pixel is decoded.

    Args:
        data: encoded image.
        formats: allowed formats, from `DEFAULT_FORMATS` and `OPTIONAL_FORMATS`.
        max_pixels: limit on width x height.

    Raises:
        ImageError: the format is not allowed, the image is too large, or it is damaged or incomplete.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(formats)) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"the image has {image.width} x {image.height} pixels, more than {max_pixels}")
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
                raise ImageError(f"the image has more than {_MAX_JPEG_SCANS} scans")
            if image.format == "PNG" and _PNG_END not in data:  # the decoder fills missing rows with black
                raise ImageError("the image is incomplete")
            return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of many types for damaged images
        raise ImageError(f"the image is neither complete nor of an allowed format ({', '.join(formats)})") from error


async def decode_off_loop(decode: Callable[[], _T], timeout_s: float = 30.0) -> _T:
    """Call a function that decodes untrusted bytes in a thread and return its result.

    Args:
        decode: function whose own limits bound its work, because a thread cannot be killed.
        timeout_s: limit in seconds on waiting for a thread and decoding.

    Raises:
        ImageError: the function has not returned within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _threads.run(decode)
    except TimeoutError as error:
        raise ImageError(f"the image was not decoded within {timeout_s:g} s") from error
