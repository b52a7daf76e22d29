"""Screenshots by hash: verified, decoded once, kept until room is needed. Knows no engine and no wire format.

A cache, not a session: whoever asks for a screenshot that was evicted is told so and sends it again.
"""

from __future__ import annotations

import io
from collections import OrderedDict

from PIL import Image

from deskrl.core.ids import image_hash


class ImageError(ValueError):
    """Bytes that are no image, or not the image that they are named after."""


def decode_image(name: str, data: bytes) -> Image.Image:
    """The pixels of an encoded screenshot, checked against its name.

    Raises:
        ImageError: the name is not the hash of the bytes, or the bytes are no image.
    """
    if image_hash(data) != name:
        raise ImageError(f"image {name} has other bytes than its name says")
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {name} cannot be decoded: {error}") from error


class ImageCache:
    """Decoded screenshots by hash, the least recently used one evicted first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def put(self, name: str, image: Image.Image) -> None:
        """Keep a screenshot, at the price of older ones."""
        if name not in self._images:
            self.num_bytes += _num_bytes(image)
        self._images[name] = image
        self._images.move_to_end(name)
        while self.num_bytes > self._max_bytes:
            _, evicted = self._images.popitem(last=False)
            self.num_bytes -= _num_bytes(evicted)

    def get(self, name: str) -> Image.Image | None:
        """The screenshot of this hash, or None if it is not (or no longer) here."""
        image = self._images.get(name)
        if image is not None:
            self._images.move_to_end(name)
        return image


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
