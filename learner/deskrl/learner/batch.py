"""From rows to tensors: pads, places screenshots, finds the positions whose logits are needed.

A screenshot is processed once and enters a micro-batch once, however many rows show it. Knows the model's tokens and
its processor; knows neither rewards nor losses.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from deskrl.learner.packing import Row

PIXEL_CACHE_BYTES = 512 * 1024**2


class ProcessedImage(NamedTuple):
    """One screenshot ready for the vision tower."""

    pixel_values: Tensor
    grid_thw_3: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. Suffixes: B rows, L positions, N action tokens, I places of images."""

    input_ids_BL: Tensor
    position_ids_3BL: Tensor
    pixel_values: Tensor | None
    """Patches of the distinct images, as the processor lays them out."""
    grid_thw_U3: Tensor | None
    """Patch grid of each distinct image."""
    image_index_I: Tensor
    """For each place of an image, row by row: which distinct image stands there."""
    row_N: Tensor
    position_N: Tensor
    """Where the logits of each action token are found: one position before it."""
    target_N: Tensor
    behaviour_logprobs_N: Tensor
    lag_N: Tensor
    trajectory_N: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)


class PixelCache:
    """Screenshots as the processor makes them, by hash; the least recently used go first.

    Args:
        image_processor: the model's own.
        fetch: bytes of screenshots by hash.
        max_bytes: kept between micro-batches.
    """

    def __init__(
        self,
        image_processor: Any,
        fetch: Callable[[Collection[str]], Mapping[str, bytes]],
        max_bytes: int = PIXEL_CACHE_BYTES,
    ) -> None:
        self._process = image_processor
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, ProcessedImage] = OrderedDict()

    def get(self, hashes: Collection[str]) -> list[ProcessedImage]:
        """Processed screenshots, in the order of `hashes`."""
        missing = [name for name in hashes if name not in self._entries]
        for name, data in self._fetch(missing).items() if missing else ():
            self._entries[name] = self._process_one(data)
            self._num_bytes += self._entries[name].pixel_values.nbytes
        for name in hashes:
            self._entries.move_to_end(name)
        found = [self._entries[name] for name in hashes]
        while self._num_bytes > self._max_bytes and self._entries:
            _, dropped = self._entries.popitem(last=False)
            self._num_bytes -= dropped.pixel_values.nbytes
        return found

    def _process_one(self, data: bytes) -> ProcessedImage:
        with Image.open(io.BytesIO(data)) as picture:
            output = self._process(images=[picture.convert("RGB")], return_tensors="pt")
        return ProcessedImage(output["pixel_values"], output["image_grid_thw"][0])


class Collator:
    """Makes micro-batches for one model.

    Args:
        pixels: screenshots of this model's processor.
        image_token_id: the token that stands for a part of a screenshot.
        pad_token_id: any token; what follows a row's end influences nothing before it.
        merge_size: side of the square of patches that makes one token.
        rope_index: the model's own rule for positions: (input_ids, mm_token_type_ids, image_grid_thw) → (3, 1, L).
    """

    def __init__(
        self,
        pixels: PixelCache,
        image_token_id: int,
        pad_token_id: int,
        merge_size: int,
        rope_index: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self._pixels = pixels
        self._image_token_id = image_token_id
        self._pad_token_id = pad_token_id
        self._merge_size = merge_size
        self._rope_index = rope_index

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """One micro-batch.

        Raises:
            RuntimeError: a row holds another number of image tokens than its screenshots make, so what acted and what
                learns disagree about the processor.
        """
        length = max(len(row.token_ids) for row in rows)
        input_ids_BL = torch.full((len(rows), length), self._pad_token_id)
        position_ids_3BL = torch.zeros((3, len(rows), length), dtype=torch.long)
        index_of = {name: i for i, name in enumerate(dict.fromkeys(name for row in rows for name in row.images))}
        distinct = self._pixels.get(index_of)
        for index, row in enumerate(rows):
            ids_L = torch.tensor(row.token_ids)
            input_ids_BL[index, : len(ids_L)] = ids_L
            grids = [distinct[index_of[name]].grid_thw_3 for name in row.images]
            position_ids_3BL[:, index, : len(ids_L)] = self._positions(ids_L, grids)
        return MicroBatch(
            input_ids_BL=input_ids_BL,
            position_ids_3BL=position_ids_3BL,
            pixel_values=torch.cat([image.pixel_values for image in distinct]) if distinct else None,
            grid_thw_U3=torch.stack([image.grid_thw_3 for image in distinct]) if distinct else None,
            image_index_I=_longs(index_of[name] for row in rows for name in row.images),
            row_N=_longs(i for i, row in enumerate(rows) for _ in row.targets),
            position_N=_longs(target - 1 for row in rows for target in row.targets),
            target_N=_longs(row.token_ids[target] for row in rows for target in row.targets),
            behaviour_logprobs_N=torch.tensor([value for row in rows for value in row.behaviour_logprobs]),
            lag_N=_longs(lag for row in rows for lag in row.lags),
            trajectory_N=_longs(row.trajectory for row in rows for _ in row.targets),
        )

    def _positions(self, ids_L: Tensor, grids: list[Tensor]) -> Tensor:
        is_image_L = ids_L == self._image_token_id
        expected = sum(int(grid.prod()) // self._merge_size**2 for grid in grids)
        if int(is_image_L.sum()) != expected:
            raise RuntimeError(
                f"a prompt holds {int(is_image_L.sum())} image tokens where its {len(grids)} screenshots make "
                f"{expected}: inference and learner use different processors"
            )
        grid_thw = torch.stack(grids) if grids else None
        return self._rope_index(ids_L[None], is_image_L[None].int(), grid_thw)[:, 0]


def _longs(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
