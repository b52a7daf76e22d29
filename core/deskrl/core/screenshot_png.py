"""Opens encoded screenshots of episodes, which deskrl writes as PNG."""

from __future__ import annotations

import io

from PIL import Image


def open_screenshot(data: bytes) -> Image.Image:
    """Open an encoded screenshot; its pixels are decoded on first use.

    Only PNG is accepted. Of Pillow's other formats, some are decoded by programs that it starts.

    Raises:
        OSError: `data` is not a PNG image.
        Image.DecompressionBombError: the image has too many pixels.
    """
    return Image.open(io.BytesIO(data), formats=["PNG"])
