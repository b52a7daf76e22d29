"""Screenshots are what their names say, and are kept while there is room."""

import asyncio
import io

import pytest
import torch
from PIL import Image

from deskrl.core.byte_cache import ByteCache
from deskrl.core.ids import image_hash
from deskrl.inference.images import ImageError, Screenshots, decode_image
from deskrl.inference.pixels import Patches


def png(shade: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (10, 10), shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_becomes_three_channels(mode: str) -> None:
    data = png(7, mode)
    image = decode_image(image_hash(data), data)
    assert (image.mode, image.size) == ("RGB", (10, 10))


def test_bytes_of_another_name_are_refused_even_where_the_screenshot_is_known() -> None:
    async def scenario() -> None:
        screenshots = Screenshots(lambda _: patches(), max_bytes=1000)
        await screenshots.add(image_hash(png(7)), png(7))
        with pytest.raises(ImageError, match="other bytes"):
            await screenshots.add(image_hash(png(7)), png(8))

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"", b"no image", png(7)[:40]], ids=["empty", "text", "cut short"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(image_hash(data), data)


def patches(num_bytes: int = 300) -> Patches:
    return Patches(torch.zeros(1, num_bytes, dtype=torch.uint8), torch.ones(3, dtype=torch.long), num_tokens=1)


def test_the_least_recently_used_image_makes_room() -> None:
    entries = [patches() for _ in range(3)]
    cache: ByteCache[Patches] = ByteCache(max_bytes=2 * 300)
    cache.put("a", entries[0], entries[0].num_bytes)
    cache.put("b", entries[1], entries[1].num_bytes)
    assert cache.get("a") is entries[0]
    cache.put("c", entries[2], entries[2].num_bytes)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (entries[0], None, entries[2])
    assert (len(cache), cache.num_bytes) == (2, 600)


def test_an_image_put_twice_takes_room_once() -> None:
    cache: ByteCache[Patches] = ByteCache(max_bytes=1000)
    for _ in range(2):
        cache.put("a", patches(), 300)
    assert cache.num_bytes == 300


def test_a_screenshot_that_several_requests_bring_is_made_ready_once_and_kept() -> None:
    made: list[Image.Image] = []

    def make(image: Image.Image) -> Patches:
        made.append(image)
        return patches()

    async def scenario() -> None:
        screenshots = Screenshots(make, max_bytes=1000)
        name = image_hash(png(7))
        together = await asyncio.gather(*(screenshots.add(name, png(7)) for _ in range(3)))
        later = await screenshots.add(name, png(7))
        assert {id(one) for one in [*together, later, screenshots.get(name)]} == {id(later)}

    asyncio.run(scenario())
    assert len(made) == 1


def test_what_cannot_be_shown_is_refused_and_not_kept() -> None:
    def refuse(image: Image.Image) -> Patches:
        raise ValueError("too thin")

    async def scenario() -> None:
        screenshots = Screenshots(refuse, max_bytes=1000)
        name = image_hash(png(7))
        for _ in range(2):
            with pytest.raises(ImageError, match="cannot be shown to the policy: too thin"):
                await screenshots.add(name, png(7))
        assert screenshots.get(name) is None

    asyncio.run(scenario())


def test_a_request_that_is_given_up_does_not_take_the_work_from_another() -> None:
    async def scenario() -> None:
        screenshots = Screenshots(lambda _: patches(), max_bytes=1000)
        first, second = (asyncio.ensure_future(screenshots.add(image_hash(png(7)), png(7))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).num_tokens == 1

    asyncio.run(scenario())
