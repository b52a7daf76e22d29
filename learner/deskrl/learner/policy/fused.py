"""Parts of a Qwen2-VL or Qwen2.5-VL that torch computes in fewer or faster kernels than transformers asks for.

They compute the same, and hold the same parameters under the same names. Knows formulas; knows nothing of batches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

_ALIGNMENT = 64
"""GPUs multiply matrices at full speed where rows begin at multiples of 16 bytes; a little more suits their tiles."""


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


class AlignedLinear(nn.Linear):
    """A linear layer that computes with zeros added to one of its dimensions.

    Args:
        layer: the layer, whose parameters this takes over.
        num_in: zeros that its input already has at its end.
        num_out: zeros that its output gets there.
    """

    def __init__(self, layer: nn.Linear, num_in: int, num_out: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._num_in, self._num_out = num_in, num_out

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, in features + `num_in`) to (…, out features + `num_out`)."""
        bias = None if self.bias is None else pad(self.bias, (0, self._num_out))
        return linear(hidden, pad(self.weight, (0, self._num_in, 0, self._num_out)), bias)


def align(mlp: Any) -> None:
    """Let a gated MLP compute at a width that is a multiple of 64: the vision tower's is 3420, twice as slow."""
    num_zeros = -mlp.gate_proj.out_features % _ALIGNMENT
    if num_zeros:
        mlp.gate_proj = AlignedLinear(mlp.gate_proj, 0, num_zeros)
        mlp.up_proj = AlignedLinear(mlp.up_proj, 0, num_zeros)
        mlp.down_proj = AlignedLinear(mlp.down_proj, num_zeros, 0)


def install(model: Any) -> None:
    """Replace these parts of a `Qwen2VLModel` or `Qwen2_5_VLModel`."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP, Qwen2_5_VLRMSNorm
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    model.visual.patch_embed.proj = PatchProjection(model.visual.patch_embed.proj.weight)
    for parent in list(model.modules()):
        if isinstance(parent, Qwen2_5_VLMLP):
            align(parent)
        for name, child in list(parent.named_children()):
            if isinstance(child, Qwen2VLRMSNorm | Qwen2_5_VLRMSNorm):
                norm: Any = child
                setattr(parent, name, FusedRMSNorm(norm.weight, norm.variance_epsilon))
