"""Pictures of desktops for benchmarks: plain areas, text, and a photograph's worth of noise."""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw


def desktop_picture(seed: int, size: tuple[int, int]) -> bytes:
    """A PNG that no other seed makes, about as large and as slow to decode as a screenshot of a desktop in use."""
    numbers = random.Random(seed)
    width, height = size
    picture = Image.new("RGB", size, (40, 60, 90))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top = numbers.randrange(width // 2), numbers.randrange(height // 2)
        draw.rectangle((left, top, left + width // 3, top + height // 3), fill=(250, 250, 245), outline=(90, 90, 90))
        for line in range(top + 4, top + height // 3 - 12, 14):
            draw.text((left + 6, line), numbers.randbytes(width // 60).hex(), fill=(20, 20, 20))
    photo = (width // 4, height // 4)
    levels = numbers.randbytes(photo[0] * photo[1])
    picture.paste(Image.frombytes("L", photo, levels).convert("RGB"), (width - photo[0], height - photo[1]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
