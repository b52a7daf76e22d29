"""Parts of a Qwen2-VL or Qwen2.5-VL that torch computes in one kernel where transformers takes several.

They compute the same, and hold the same parameters under the same names. Knows formulas; knows nothing of batches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm


class FusedRMSNorm(nn.Module):
    """An RMS norm over the last dimension.

    Args:
        weight: the parameter.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """In the type of its input; the mean square is taken in float32."""
        return rms_norm(hidden, self.weight.shape, self.weight, self._eps)


class PatchProjection(nn.Module):
    """The first layer of the vision tower: a convolution whose windows do not overlap is a product of matrices.

    Args:
        weight: of the convolution, (channels out, channels in, time, height, width).
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels in, time, height, width) to (patches, channels out)."""
        return linear(patches.flatten(1), self.weight.flatten(1))


def install(model: Any) -> None:
    """Replace these parts of a `Qwen2VLModel` or `Qwen2_5_VLModel`."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    model.visual.patch_embed.proj = PatchProjection(model.visual.patch_embed.proj.weight)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Qwen2VLRMSNorm | Qwen2_5_VLRMSNorm):
                norm: Any = child
                setattr(parent, name, FusedRMSNorm(norm.weight, norm.variance_epsilon))
