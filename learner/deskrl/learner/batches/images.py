"""Screenshots on their way to the model: as the processor makes them, and as a frozen vision tower sees them.

Both are kept by the screenshot's hash, so that each is made once as long as there is room. Knows the processor; knows
neither rows nor the model.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deskrl.core.byte_cache import ByteCache

PIXEL_CACHE_BYTES = 512 * 1024**2
_NUM_THREADS = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Screenshots decoded and scaled at a time: 60 ms each, and an episode of them must not keep a GPU waiting."""


@dataclass(frozen=True)
class ProcessedImage:
    """One screenshot, ready for the vision tower or already through it: exactly one of the two is there."""

    name: str
    """Its hash."""
    grid_thw_3: Tensor
    """Patches in time, height and width."""
    pixel_values: Tensor | None
    features: Tensor | None
    """One row for each of its tokens."""

    def to(self, device: torch.device) -> ProcessedImage:
        """The same on a device."""
        return ProcessedImage(
            self.name,
            self.grid_thw_3.to(device),
            None if self.pixel_values is None else self.pixel_values.to(device),
            None if self.features is None else self.features.to(device),
        )

    @property
    def num_bytes(self) -> int:
        """What keeping it costs."""
        return sum(part.nbytes for part in (self.pixel_values, self.features) if part is not None)


class Screenshots:
    """Where the collator gets screenshots from.

    Args:
        image_processor: the model's own.
        fetch: bytes of screenshots by hash.
        features: what a frozen vision tower has made already; None if the tower learns, so that nothing stays true.
        max_bytes: of processed screenshots, kept between micro-batches.
    """

    def __init__(
        self,
        image_processor: Any,
        fetch: Callable[[Collection[str]], Mapping[str, bytes]],
        features: ByteCache[ProcessedImage] | None,
        max_bytes: int = PIXEL_CACHE_BYTES,
    ) -> None:
        self._process = image_processor
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="screenshots")
        pixels: ByteCache[ProcessedImage] = ByteCache(max_bytes)
        self._caches = (pixels,) if features is None else (features, pixels)

    def get(self, names: Collection[str]) -> list[ProcessedImage]:
        """Screenshots in the order of `names`: as features where these are known, else as pixels."""
        found = {name: image for name in names if (image := self._known(name)) is not None}
        missing = [name for name in names if name not in found]
        fetched = self._fetch(missing) if missing else {}
        for image in self._pool.map(lambda item: self._process_one(*item), fetched.items()):
            found[image.name] = image
            self._caches[-1].put(image.name, image, image.num_bytes)
        return [found[name] for name in names]

    def _known(self, name: str) -> ProcessedImage | None:
        return next((image for cache in self._caches if (image := cache.get(name)) is not None), None)

    def _process_one(self, name: str, data: bytes) -> ProcessedImage:
        with Image.open(io.BytesIO(data)) as picture:
            output = self._process(images=[picture.convert("RGB")], return_tensors="pt")
        return ProcessedImage(name, output["image_grid_thw"][0], output["pixel_values"], features=None)
