"""Screenshots are what their names say, and are kept while there is room."""

import io

import pytest
from PIL import Image

from deskrl.core.ids import image_hash
from deskrl.inference.images import ImageCache, ImageError, decode_image


def png(shade: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (10, 10), shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_becomes_three_channels(mode: str) -> None:
    data = png(7, mode)
    image = decode_image(image_hash(data), data)
    assert (image.mode, image.size) == ("RGB", (10, 10))


def test_bytes_of_another_name_are_refused() -> None:
    with pytest.raises(ImageError, match="other bytes"):
        decode_image(image_hash(b"another"), png(7))


@pytest.mark.parametrize("data", [b"", b"no image", png(7)[:40]], ids=["empty", "text", "cut short"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(image_hash(data), data)


def test_the_least_recently_used_image_makes_room() -> None:
    images = [Image.new("RGB", (10, 10), shade) for shade in range(3)]
    cache = ImageCache(max_bytes=2 * 300)
    cache.put("a", images[0])
    cache.put("b", images[1])
    assert cache.get("a") is images[0]
    cache.put("c", images[2])
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (images[0], None, images[2])
    assert (len(cache), cache.num_bytes) == (2, 600)


def test_an_image_put_twice_takes_room_once() -> None:
    cache = ImageCache(max_bytes=1000)
    for _ in range(2):
        cache.put("a", Image.new("RGB", (10, 10)))
    assert cache.num_bytes == 300
