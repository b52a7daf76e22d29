"""Screenshots as the policy sees them: scaled and cut into patches by the model's own processor, and left as bytes.

A processor does two things to an image. The first, scaling and cutting, gives bytes; it is done here, in threads, as
soon as a screenshot arrives. The second makes a float of each byte, always the same one for a byte of a channel: a
table of 256 floats a channel, which `worker` looks up on its device. Bytes are an eighth of the floats to keep and to
move (which have every patch twice, as two frames of a film), and the floats are exactly the processor's, because the
table is read off it. Knows the processor; knows no engine and no hashes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NUM_CHANNELS = 3
_NUM_LEVELS = 256


@dataclass(frozen=True)
class Patches:
    """One screenshot. Suffixes: N patches, D bytes of one patch, channel by channel."""

    levels_ND: Tensor
    """Bytes, in the order in which the vision tower takes patches."""
    grid_thw_3: Tensor
    """Frames (1), rows and columns of patches."""
    num_tokens: int
    """What the screenshot costs of a prompt."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return int(self.levels_ND.nbytes)


@dataclass(frozen=True)
class FloatTable:
    """How a processor makes floats of bytes."""

    values: list[list[float]]
    """For each channel, what each of its 256 levels becomes."""
    num_frames: int
    """How often a patch of a still image is repeated."""


class PixelProcessor:
    """A model's image processor, split into what is done ahead of need and what is left to the worker.

    May be called from several threads at once.
    """

    def __init__(self, model_folder: Path) -> None:
        """Load the folder's processor.

        Raises:
            UserError: there is none that transformers can load, or it is of another kind than Qwen2-VL's.
        """
        from transformers import AutoImageProcessor

        mend = "copy preprocessor_config.json from the original model"
        try:
            self._process: Any = AutoImageProcessor.from_pretrained(model_folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{model_folder}: no image processor can be loaded: {reason}", mend) from error
        if not hasattr(self._process, "merge_size") or not hasattr(self._process, "temporal_patch_size"):
            raise UserError(
                f"{model_folder}: {type(self._process).__name__} is not an image processor of Qwen2-VL", mend
            )

    def patches(self, image: Image) -> Patches:
        """Scale an image and cut it into patches."""
        output = self._bytes_of(image)
        (grid_thw_3,) = output["image_grid_thw"]
        num_tokens = int(grid_thw_3.prod()) // self._process.merge_size**2
        return Patches(output["pixel_values"], grid_thw_3, num_tokens)

    def float_table(self) -> FloatTable:
        """The second half, read off what the processor makes of an image that has every level in every channel."""
        import torch
        from PIL import Image

        unit = self._process.patch_size * self._process.merge_size
        side = unit * math.ceil(math.sqrt(_NUM_LEVELS) / unit)
        levels = bytes(index % _NUM_LEVELS for index in range(side * side))
        probe = Image.merge("RGB", [Image.frombytes("L", (side, side), levels)] * NUM_CHANNELS)
        levels_ND = self._bytes_of(probe, do_resize=False)["pixel_values"]
        floats_ND = self._process(images=[probe], do_resize=False, temporal_patch_size=1, return_tensors="pt")[
            "pixel_values"
        ]
        table = torch.empty(NUM_CHANNELS, _NUM_LEVELS)
        by_channel = (array.reshape(len(array), NUM_CHANNELS, -1).transpose(0, 1) for array in (levels_ND, floats_ND))
        for row, channel_levels, channel_floats in zip(table, *by_channel, strict=True):
            row[channel_levels.flatten().long()] = channel_floats.flatten()
        return FloatTable(table.tolist(), self._process.temporal_patch_size)

    def _bytes_of(self, image: Any, **options: bool) -> Any:
        """The processor's output without its arithmetic and without repeated frames."""
        import torch

        output = self._process(
            images=[image],
            do_rescale=False,
            do_normalize=False,
            temporal_patch_size=1,
            return_tensors="pt",
            **options,
        )
        # Without torchvision the processor calculates in floats, which hold bytes all the same.
        output["pixel_values"] = output["pixel_values"].to(torch.uint8)
        return output


def patch_floats(levels_ND: Tensor, table: Tensor, num_frames: int) -> Tensor:
    """Patches as the vision tower takes them: channel by channel, each channel's frames one after another."""
    import torch

    num_channels, num_levels = table.shape
    first_C1 = torch.arange(0, table.numel(), num_levels, device=levels_ND.device, dtype=torch.int32)[:, None]
    index_NCP = levels_ND.reshape(len(levels_ND), num_channels, -1).int() + first_C1
    floats_NCP = table.flatten()[index_NCP]
    return floats_NCP[:, :, None].expand(-1, -1, num_frames, -1).reshape(len(levels_ND), -1)
