"""Image preprocessing of the policy: scaling, cutting into patches, and normalisation by lookup table.

The model's own image processor does two things. First it scales an image and cuts it into patches, which yields bytes;
this happens in threads as soon as a screenshot arrives. Then it normalises each byte to a float, which depends only on
the byte and its channel; this happens on the device of the worker, by a lookup in a table of 256 floats per channel.
Keeping and moving bytes costs an eighth of the floats, which contain each patch twice (as two video frames). The floats
equal those of the processor exactly, because the table is read from the output of the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import read_image_sizing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NUM_CHANNELS = 3
_NUM_LEVELS = 256


@dataclass(frozen=True)
class ImagePatches:
    """Preprocessed screenshot. Suffixes: N patches, D bytes per patch, channel by channel."""

    levels_ND: Tensor
    """Bytes (uint8) in the patch order of the vision tower."""
    grid_thw_3: Tensor
    """Number of frames (1), rows and columns of patches."""
    num_tokens: int
    """Number of prompt tokens of the screenshot."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return int(self.levels_ND.nbytes)


@dataclass(frozen=True)
class NormalisationTable:
    """Lookup table from bytes to normalised floats."""

    values: list[list[float]]
    """Normalised float of each of the 256 levels, per channel."""
    num_frames: int
    """Number of times that the vision tower expects each patch of a still image."""


class PatchProcessor:
    """First part of a model's image processor, and the table for the second. Thread-safe."""

    def __init__(self, model_folder: Path) -> None:
        """Load the image processor of a model folder.

        Raises:
            UserError: transformers cannot load an image processor, or it differs from the kind of Qwen2-VL.
        """
        from transformers import AutoImageProcessor

        hint = "copy preprocessor_config.json from the original model"
        try:
            self._process: Any = AutoImageProcessor.from_pretrained(model_folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{model_folder}: the image processor cannot be loaded: {one_line(error)}", hint) from error
        sizing = read_image_sizing(model_folder)
        self._size = {"shortest_edge": sizing.min_pixels, "longest_edge": sizing.max_pixels}
        if not hasattr(self._process, "merge_size") or not hasattr(self._process, "temporal_patch_size"):
            raise UserError(
                f"{model_folder}: {type(self._process).__name__} is not an image processor of the Qwen2-VL kind", hint
            )

    def patches(self, image: Image) -> ImagePatches:
        """Scale an image and cut it into patches; raises ValueError for unsupported sizes."""
        output = self._unnormalised(image)
        (grid_thw_3,) = output["image_grid_thw"]
        num_tokens = int(grid_thw_3.prod()) // self._process.merge_size**2
        return ImagePatches(output["pixel_values"], grid_thw_3, num_tokens)

    def normalisation_table(self) -> NormalisationTable:
        """Return the table, read from the processor's output for an image with every level in every channel."""
        import torch
        from PIL import Image

        unit = self._process.patch_size * self._process.merge_size
        side = unit * math.ceil(math.sqrt(_NUM_LEVELS) / unit)
        levels = bytes(index % _NUM_LEVELS for index in range(side * side))
        probe = Image.merge("RGB", [Image.frombytes("L", (side, side), levels)] * NUM_CHANNELS)
        levels_ND = self._unnormalised(probe, do_resize=False)["pixel_values"]
        floats_ND = self._process(images=[probe], do_resize=False, temporal_patch_size=1, return_tensors="pt")[
            "pixel_values"
        ]
        table = torch.empty(NUM_CHANNELS, _NUM_LEVELS)
        by_channel = (array.reshape(len(array), NUM_CHANNELS, -1).transpose(0, 1) for array in (levels_ND, floats_ND))
        for row, channel_levels, channel_floats in zip(table, *by_channel, strict=True):
            row[channel_levels.flatten().long()] = channel_floats.flatten()
        return NormalisationTable(table.tolist(), self._process.temporal_patch_size)

    def _unnormalised(self, image: Any, **options: bool) -> Any:
        """Return the output of the processor without normalisation and without repeated frames."""
        import torch

        output = self._process(
            images=[image],
            do_rescale=False,
            do_normalize=False,
            temporal_patch_size=1,
            size=self._size,  # for one frame
            return_tensors="pt",
            **options,
        )
        # Without torchvision the processor returns floats; their values are still those of bytes.
        output["pixel_values"] = output["pixel_values"].to(torch.uint8)
        return output


def normalise_patches(levels_ND: Tensor, table: Tensor, num_frames: int) -> Tensor:
    """Return normalised patches in the format of the vision tower: per channel, the frames one after another.

    Args:
        levels_ND: bytes of the patches.
        table: floats of shape (channels, levels).
        num_frames: number of repetitions of each patch.
    """
    import torch

    num_channels, num_levels = table.shape
    first_C1 = torch.arange(0, table.numel(), num_levels, device=levels_ND.device, dtype=torch.int32)[:, None]
    index_NCP = levels_ND.reshape(len(levels_ND), num_channels, -1).int() + first_C1
    floats_NCP = table.flatten()[index_NCP]
    return floats_NCP[:, :, None].expand(-1, -1, num_frames, -1).reshape(len(levels_ND), -1)
