"""Synthetic desktop screenshots for benchmarks: windows with text, and an area of noise like a photograph."""

from __future__ import annotations

import functools
import io
import random

from PIL import Image, ImageDraw

_NUM_DESKTOPS = 8


def desktop_screenshot(seed: int, size: tuple[int, int]) -> bytes:
    """Return a PNG that is unique to the seed, with the size and decoding time of a typical desktop screenshot."""
    numbers = random.Random(seed)
    width, height = size
    picture = _desktop(seed % _NUM_DESKTOPS, size).copy()
    photo = (width // 4, height // 4)
    levels = Image.frombytes("L", photo, numbers.randbytes(photo[0] * photo[1])).convert("RGB")
    picture.paste(levels, (numbers.randrange(width - photo[0]), numbers.randrange(height - photo[1])))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


@functools.cache
def _desktop(number: int, size: tuple[int, int]) -> Image.Image:
    """Draw windows with text."""
    numbers = random.Random(number)
    width, height = size
    picture = Image.new("RGB", size, (40, 60, 90))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top = numbers.randrange(width // 2), numbers.randrange(height // 2)
        draw.rectangle((left, top, left + width // 3, top + height // 3), fill=(250, 250, 245), outline=(90, 90, 90))
        for line in range(top + 4, top + height // 3 - 12, 14):
            draw.text((left + 6, line), numbers.randbytes(width // 60).hex(), fill=(20, 20, 20))
    return picture
