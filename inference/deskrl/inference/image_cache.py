"""Cache of preprocessed screenshots by hash.

It holds no session state: a client that refers to an evicted screenshot is asked to send it again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import TYPE_CHECKING

from PIL import Image

from deskrl.core.ids import image_hash
from deskrl.core.lru_cache import SharedLRUCache
from deskrl.core.screenshot_png import open_screenshot
from deskrl.inference import metrics

if TYPE_CHECKING:
    from deskrl.inference.image_preprocessing import ImagePatches

_MAX_THREADS = 8
"""Limit on concurrent preprocessing: eight cores prepare about 500 screenshots per second, more than a GPU consumes."""


class ImageError(ValueError):
    """Invalid image: its bytes cannot be decoded, do not match its hash, or have an unsupported size."""


def decode_image(name: str, data: bytes) -> Image.Image:
    """Return the RGB image that is encoded in `data`.

    Args:
        name: hash of the image, for the error.
        data: encoded image.

    Raises:
        ImageError: `data` is not a PNG image that Pillow can decode.
    """
    try:
        return open_screenshot(data).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {name} cannot be decoded: {error}") from error


class ImageCache:
    """Preprocesses screenshots in threads, once each, and caches the results.

    Decoding and scaling release the GIL, so that they do not block the event loop. Use from a single event loop.
    """

    def __init__(self, make_patches: Callable[[Image.Image], ImagePatches], max_bytes: int) -> None:
        """Create an empty cache.

        Args:
            make_patches: preprocesses an image; raises ValueError if the policy cannot process it.
            max_bytes: capacity of the cache.
        """
        self._make_patches = make_patches
        self._cache: SharedLRUCache[ImagePatches] = SharedLRUCache(max_bytes, attrgetter("num_bytes"))
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, "screenshots", initializer=_use_one_core)
        self._pending: dict[str, asyncio.Future[ImagePatches]] = {}

    def get(self, name: str) -> ImagePatches | None:
        """Return the screenshot with this hash, or None if it is not cached."""
        return self._cache.get(name)

    async def add(self, name: str, data: bytes) -> ImagePatches:
        """Preprocess a screenshot and cache the result; concurrent calls for the same screenshot share the work.

        Args:
            name: hash of the screenshot.
            data: encoded screenshot.

        Raises:
            ImageError: `name` is not the hash of `data`, or `data` is not an image that the policy can process.
        """
        if image_hash(data) != name:
            raise ImageError(f"image {name}: the hash does not match the data")
        if name not in self._pending:
            if (patches := self._cache.get(name)) is not None:
                return patches
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._preprocess, name, data)
            self._pending[name] = work
            work.add_done_callback(lambda done: self._store(name, done))
        # Shielded, because another request may await the same work when this one is cancelled.
        return await asyncio.shield(self._pending[name])

    def _preprocess(self, name: str, data: bytes) -> ImagePatches:
        started_s = time.perf_counter()
        image = decode_image(name, data)
        try:
            patches = self._make_patches(image)
        except ValueError as error:
            raise ImageError(f"image {name} cannot be processed for the policy: {error}") from error
        metrics.IMAGE_SECONDS.observe(time.perf_counter() - started_s)
        return patches

    def _store(self, name: str, done: asyncio.Future[ImagePatches]) -> None:
        del self._pending[name]
        if not done.cancelled() and done.exception() is None:
            patches = done.result()
            self._cache[name] = patches
            metrics.IMAGE_BYTES.set(self._cache.currsize)


def _use_one_core() -> None:
    """Limit torch to one thread per worker thread: otherwise each worker would start threads for all cores."""
    import torch

    torch.set_num_threads(1)
