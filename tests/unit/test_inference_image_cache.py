"""Image cache: screenshots are verified, preprocessed once, and evicted when the cache is full."""

import asyncio
import io
from operator import attrgetter

import pytest
import torch
from PIL import Image

from deskrl.core.ids import image_hash
from deskrl.core.lru_cache import SharedLRUCache
from deskrl.inference.image_cache import ImageCache, ImageError, decode_image
from deskrl.inference.image_preprocessing import ImagePatches


def png(shade: int, mode: str = "RGB", file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (10, 10), shade).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_is_decoded_to_three_channels(mode: str) -> None:
    data = png(7, mode)
    image = decode_image(image_hash(data), data)
    assert (image.mode, image.size) == ("RGB", (10, 10))


def test_data_that_does_not_match_its_hash_is_rejected_even_if_the_hash_is_cached() -> None:
    async def scenario() -> None:
        cache = ImageCache(lambda _: patches(), max_bytes=1000)
        await cache.add(image_hash(png(7)), png(7))
        with pytest.raises(ImageError, match="does not match the data"):
            await cache.add(image_hash(png(7)), png(8))

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"", b"no image", png(7)[:40], png(7, file_format="EPS"), png(7, file_format="BMP")])
def test_data_that_is_not_a_png_image_is_rejected(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(image_hash(data), data)


def patches(num_bytes: int = 300) -> ImagePatches:
    return ImagePatches(torch.zeros(1, num_bytes, dtype=torch.uint8), torch.ones(3, dtype=torch.long), num_tokens=1)


def test_the_least_recently_used_image_is_evicted() -> None:
    entries = [patches() for _ in range(3)]
    cache: SharedLRUCache[ImagePatches] = SharedLRUCache(2 * 300, attrgetter("num_bytes"))
    cache["a"] = entries[0]
    cache["b"] = entries[1]
    assert cache.get("a") is entries[0]
    cache["c"] = entries[2]
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (entries[0], None, entries[2])
    assert (len(cache), cache.currsize) == (2, 600)


def test_an_image_that_is_stored_twice_is_counted_once() -> None:
    cache: SharedLRUCache[ImagePatches] = SharedLRUCache(1000, attrgetter("num_bytes"))
    for _ in range(2):
        cache["a"] = patches()
    assert cache.currsize == 300


def test_a_screenshot_in_several_concurrent_requests_is_preprocessed_once_and_cached() -> None:
    preprocessed: list[Image.Image] = []

    def make_patches(image: Image.Image) -> ImagePatches:
        preprocessed.append(image)
        return patches()

    async def scenario() -> None:
        cache = ImageCache(make_patches, max_bytes=1000)
        name = image_hash(png(7))
        concurrent = await asyncio.gather(*(cache.add(name, png(7)) for _ in range(3)))
        later = await cache.add(name, png(7))
        assert {id(one) for one in [*concurrent, later, cache.get(name)]} == {id(later)}

    asyncio.run(scenario())
    assert len(preprocessed) == 1


def test_an_image_that_the_policy_cannot_process_is_rejected_and_not_cached() -> None:
    def reject(image: Image.Image) -> ImagePatches:
        raise ValueError("too thin")

    async def scenario() -> None:
        cache = ImageCache(reject, max_bytes=1000)
        name = image_hash(png(7))
        for _ in range(2):
            with pytest.raises(ImageError, match="cannot be processed for the policy: too thin"):
                await cache.add(name, png(7))
        assert cache.get(name) is None

    asyncio.run(scenario())


def test_cancelling_one_request_does_not_cancel_the_preprocessing_for_another() -> None:
    async def scenario() -> None:
        cache = ImageCache(lambda _: patches(), max_bytes=1000)
        first, second = (asyncio.ensure_future(cache.add(image_hash(png(7)), png(7))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).num_tokens == 1

    asyncio.run(scenario())
