"""Screenshots by hash: verified, made ready once, kept until room is needed. Knows no engine and no wire format.

A cache, not a session: whoever asks for a screenshot that was evicted is told so and sends it again.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from PIL import Image

from deskrl.core.byte_cache import ByteCache
from deskrl.core.ids import image_hash
from deskrl.inference import metrics

if TYPE_CHECKING:
    from deskrl.inference.pixels import Patches

_MAX_THREADS = 8
"""Screenshots made ready at a time, at most: eight cores make about 500 a second, more than a GPU can look at."""


class ImageError(ValueError):
    """Bytes that are no image, or not the image that they are named after."""


def decode_image(name: str, data: bytes) -> Image.Image:
    """The pixels of an encoded screenshot.

    Raises:
        ImageError: the bytes are no image.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {name} cannot be decoded: {error}") from error


class Screenshots:
    """Makes screenshots ready for the engine in threads, once each, and keeps them.

    Decoding and scaling release the interpreter, so they take no time from the event loop. Call from one event loop.
    """

    def __init__(self, patches_of: Callable[[Image.Image], Patches], max_bytes: int) -> None:
        """Keep up to `max_bytes` of what `patches_of` makes."""
        self._patches_of = patches_of
        self._cache: ByteCache[Patches] = ByteCache(max_bytes)
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, "screenshots", initializer=_use_one_core)
        self._under_way: dict[str, asyncio.Future[Patches]] = {}

    def get(self, name: str) -> Patches | None:
        """The screenshot of this hash, or None if it is not (or no longer) here."""
        return self._cache.get(name)

    async def add(self, name: str, data: bytes) -> Patches:
        """The screenshot that these bytes encode; made ready once, however many requests bring it at a time.

        Raises:
            ImageError: the name is not the hash of the bytes, or the bytes are no image that the policy could see.
        """
        if image_hash(data) != name:
            raise ImageError(f"image {name} has other bytes than its name says")
        if name not in self._under_way:
            if (ready := self._cache.get(name)) is not None:
                return ready
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._make, name, data)
            self._under_way[name] = work
            work.add_done_callback(lambda done: self._keep(name, done))
        # Another request may wait for the same work: it goes on if this one is cancelled.
        return await asyncio.shield(self._under_way[name])

    def _make(self, name: str, data: bytes) -> Patches:
        started_s = time.perf_counter()
        image = decode_image(name, data)
        try:
            patches = self._patches_of(image)
        except ValueError as error:
            raise ImageError(f"image {name} cannot be shown to the policy: {error}") from error
        metrics.IMAGE_SECONDS.observe(time.perf_counter() - started_s)
        return patches

    def _keep(self, name: str, done: asyncio.Future[Patches]) -> None:
        del self._under_way[name]
        if not done.cancelled() and done.exception() is None:
            patches = done.result()
            self._cache.put(name, patches, patches.num_bytes)
            metrics.IMAGE_BYTES.set(self._cache.num_bytes)


def _use_one_core() -> None:
    """Keep torch to one core a screenshot: others are at work beside it, and each would start threads for all cores."""
    import torch

    torch.set_num_threads(1)
