"""From rows to tensors: lays rows end to end, places screenshots, finds the positions whose logits are needed.

A screenshot enters a micro-batch once, however many rows show it. Knows the model's tokens; knows neither rewards nor
losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deskrl.learner.batches.images import ProcessedImage, Screenshots
from deskrl.learner.batches.packing import Row


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, end to end. Suffixes: L positions of all rows, N action tokens."""

    input_ids_L: Tensor
    position_ids_3L: Tensor
    row_lengths: tuple[int, ...]
    images: tuple[ProcessedImage, ...]
    """The distinct screenshots."""
    image_places: tuple[int, ...]
    """For each place of a screenshot, row by row: which of `images` stands there."""
    position_N: Tensor
    """Where the logits of each action token are found: one position before it."""
    target_N: Tensor
    behaviour_logprobs_N: Tensor
    lag_N: Tensor
    trajectory_N: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        moved: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, images=tuple(image.to(device) for image in self.images), **moved)


class Collator:
    """Makes micro-batches for one model.

    Args:
        screenshots: of this model's processor.
        image_token_id: the token that stands for a part of a screenshot.
        merge_size: side of the square of patches that makes one token.
        rope_index: the model's own rule for positions: (input_ids, mm_token_type_ids, image_grid_thw) → (3, 1, L).
    """

    def __init__(
        self,
        screenshots: Screenshots,
        image_token_id: int,
        merge_size: int,
        rope_index: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self._screenshots = screenshots
        self._image_token_id = image_token_id
        self._merge_size = merge_size
        self._rope_index = rope_index

    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """One micro-batch.

        Raises:
            RuntimeError: a row holds another number of image tokens than its screenshots make, so what acted and what
                learns disagree about the processor.
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
            image_places=tuple(names.index(name) for row in rows for name in row.images),
            position_N=_longs(
                start + target - 1 for start, row in zip(starts, rows, strict=False) for target in row.targets
            ),
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
