"""Collates rows into micro-batches: concatenates rows, adds their screenshots and the positions of action tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deskrl.learner.batches.image_processing import ProcessedImage, ScreenshotProcessor
from deskrl.learner.batches.packing import Row


@dataclass(frozen=True)
class MicroBatch:
    """Rows concatenated for one forward pass. Suffixes: L positions of all rows, N action tokens."""

    input_ids_L: Tensor
    position_ids_3L: Tensor
    row_lengths: tuple[int, ...]
    """Number of positions of each row."""
    images: tuple[ProcessedImage, ...]
    """Distinct screenshots of all rows; a screenshot that several rows show occurs once."""
    image_indices: tuple[int, ...]
    """Index into `images` of each screenshot in the rows, row by row."""
    position_N: Tensor
    """Position of the logits of each action token: one before the token."""
    target_N: Tensor
    """Token ids of the action tokens."""
    behaviour_logprobs_N: Tensor
    staleness_N: Tensor
    trajectory_N: Tensor
    """Index of each action token's trajectory in the batch."""
    turn_N: Tensor
    """Index of each action token's turn (step of its episode) in the micro-batch, which has all tokens of the turn."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on a device."""
        moved: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, images=tuple(image.to(device) for image in self.images), **moved)


class Collator:
    """Collates micro-batches for one model.

    Args:
        screenshots: provides processed screenshots.
        image_token_id: id of the token that stands for a part of a screenshot.
        merge_size: side of the square of patches that makes one image token.
        rope_index: the model's function that returns position ids of shape (3, 1, L), given input_ids,
            mm_token_type_ids and image_grid_thw.
    """

    def __init__(
        self,
        screenshots: ScreenshotProcessor,
        image_token_id: int,
        merge_size: int,
        rope_index: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self._screenshots = screenshots
        self._image_token_id = image_token_id
        self._merge_size = merge_size
        self._rope_index = rope_index

    def prefetch(self, rows: Sequence[Row]) -> None:
        """Fetch the screenshots of some rows without processing them."""
        self._screenshots.prefetch(list(dict.fromkeys(name for row in rows for name in row.images)))

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """Return the micro-batch of some rows.

        Raises:
            RuntimeError: the number of image tokens in a row does not match its screenshots, so inference and learner
                use different processors.
        """
        names = list(dict.fromkeys(name for row in rows for name in row.images))
        images = dict(zip(names, self._screenshots.get(names), strict=True))
        ids = [torch.tensor(row.token_ids) for row in rows]
        positions = [
            self._positions(ids_L, [images[name].grid_thw_3 for name in row.images])
            for ids_L, row in zip(ids, rows, strict=True)
        ]
        lengths = tuple(len(row.token_ids) for row in rows)
        starts = (0, *accumulate(lengths))
        return MicroBatch(
            input_ids_L=torch.cat(ids),
            position_ids_3L=torch.cat(positions, dim=1),
            row_lengths=lengths,
            images=tuple(images.values()),
            image_indices=tuple(names.index(name) for row in rows for name in row.images),
            position_N=_longs(
                start + target - 1 for start, row in zip(starts, rows, strict=False) for target in row.targets
            ),
            target_N=_longs(row.token_ids[target] for row in rows for target in row.targets),
            behaviour_logprobs_N=torch.tensor([value for row in rows for value in row.behaviour_logprobs]),
            staleness_N=_longs(value for row in rows for value in row.staleness),
            trajectory_N=_longs(row.trajectory for row in rows for _ in row.targets),
            turn_N=_longs(turn for turn, length in enumerate(turn_lengths(rows)) for _ in range(length)),
        )

    def _positions(self, ids_L: Tensor, grids: list[Tensor]) -> Tensor:
        is_image_L = ids_L == self._image_token_id
        expected = sum(int(grid.prod()) // self._merge_size**2 for grid in grids)
        if int(is_image_L.sum()) != expected:
            raise RuntimeError(
                f"a row has {int(is_image_L.sum())} image tokens, but its {len(grids)} screenshots make {expected}: "
                "inference and learner use different processors"
            )
        grid_thw = torch.stack(grids) if grids else None
        return self._rope_index(ids_L[None], is_image_L[None].int(), grid_thw)[:, 0]


def turn_lengths(rows: Iterable[Row]) -> Iterator[int]:
    """Yield the number of action tokens of each turn in the rows."""
    for row in rows:
        yield from row.turn_lengths or (len(row.targets),)


def _longs(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
