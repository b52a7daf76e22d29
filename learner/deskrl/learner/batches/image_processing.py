"""Processes screenshots for the model and caches the results by the screenshot's hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from deskrl.core.lru_cache import SharedLRUCache
from deskrl.core.screenshot_png import open_screenshot

PIXEL_CACHE_BYTES = 512 * 1024**2
"""Default size of the cache of processed screenshots."""
_NUM_THREADS = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Screenshots processed in parallel: one takes about 60 ms, and a GPU must not wait for those of an episode."""


@dataclass(frozen=True)
class ProcessedImage:
    """A screenshot as input or as output of the vision tower: either `pixel_values` or `features` is set."""

    name: str
    """Hash of the screenshot."""
    grid_thw_3: Tensor
    """Number of patches in time, height and width."""
    pixel_values: Tensor | None
    """Patches, one row each, before the vision tower."""
    features: Tensor | None
    """Output of the vision tower, one row for each image token."""

    def to(self, device: torch.device) -> ProcessedImage:
        """Return a copy on a device."""
        return ProcessedImage(
            self.name,
            self.grid_thw_3.to(device),
            None if self.pixel_values is None else self.pixel_values.to(device),
            None if self.features is None else self.features.to(device),
        )

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that the cache counts."""
        return sum(part.nbytes for part in (self.pixel_values, self.features) if part is not None)


class ScreenshotProcessor:
    """Provides the collator with processed screenshots.

    Args:
        image_processor: image processor of the model.
        fetch: function that returns encoded screenshots by hash.
        features: cache of a frozen vision tower's outputs; None if the tower is trained, which would outdate them.
        max_bytes: size of the cache of processed screenshots.
    """

    def __init__(
        self,
        image_processor: Any,
        fetch: Callable[[Collection[str]], Mapping[str, bytes]],
        features: SharedLRUCache[ProcessedImage] | None,
        max_bytes: int = PIXEL_CACHE_BYTES,
    ) -> None:
        self._process = image_processor
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="screenshots")
        pixels: SharedLRUCache[ProcessedImage] = SharedLRUCache(max_bytes, attrgetter("num_bytes"))
        self._caches = (pixels,) if features is None else (features, pixels)

    def get(self, names: Collection[str]) -> list[ProcessedImage]:
        """Return screenshots in the order of `names`, as features if these are cached, otherwise as pixel values."""
        found = {name: image for name in names if (image := self._cached(name)) is not None}
        missing = [name for name in names if name not in found]
        fetched = self._fetch(missing) if missing else {}
        for image in self._pool.map(lambda item: self._process_one(*item), fetched.items()):
            found[image.name] = image
            self._caches[-1][image.name] = image
        return [found[name] for name in names]

    def prefetch(self, names: Collection[str]) -> None:
        """Fetch the screenshots that are not cached here; `fetch` caches them."""
        if missing := [name for name in names if self._cached(name) is None]:
            self._fetch(missing)

    def _cached(self, name: str) -> ProcessedImage | None:
        return next((image for cache in self._caches if (image := cache.get(name)) is not None), None)

    def _process_one(self, name: str, data: bytes) -> ProcessedImage:
        with open_screenshot(data) as picture:
            output = self._process(images=[picture.convert("RGB")], return_tensors="pt")
        return ProcessedImage(name, output["image_grid_thw"][0], output["pixel_values"], features=None)
