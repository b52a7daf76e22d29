"""Fused layers: faster versions of layers of transformers' models, with the same parameters and results.

The Liger kernels would also replace the norms, but need Triton and thus a GPU; these run on any device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

_ALIGNMENT = 64
"""Alignment of matrix dimensions in elements. GPUs need rows aligned to 16 bytes for full speed; 64 also suits their
tile sizes."""


class FusedRMSNorm(nn.Module):
    """RMS norm over the last dimension, computed by one kernel.

    Args:
        weight: scale parameter.
        eps: constant added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised input in its own numeric type; the mean square is computed in float32."""
        return rms_norm(hidden, self.weight.shape, self.weight, self._eps)


class PatchProjection(nn.Module):
    """First layer of the vision tower, as a matrix product: the windows of its convolution do not overlap.

    Args:
        weight: weight of the convolution, of shape (channels out, channels in, time, height, width).
        bias: bias of the convolution, of shape (channels out,); None if it has none.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches of shape (patches, channels in, time, height, width) to (patches, channels out)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class AlignedLinear(nn.Linear):
    """Linear layer computed with zero-padded dimensions.

    Args:
        layer: linear layer whose parameters are reused.
        num_in: number of zeros at the end of its input.
        num_out: number of zeros to append to its output.
    """

    def __init__(self, layer: nn.Linear, num_in: int, num_out: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.num_in, self.num_out = num_in, num_out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map an input of shape (..., in features + `num_in`) to (..., out features + `num_out`)."""
        bias = None if self.bias is None else pad(self.bias, (0, self.num_out))
        return linear(hidden, pad(self.weight, (0, self.num_in, 0, self.num_out)), bias)


def project_patches(patch_embed: Any) -> None:
    """Replace the convolution `proj` of the first layer of a vision tower."""
    patch_embed.proj = PatchProjection(patch_embed.proj.weight, patch_embed.proj.bias)


def pad_mlps(model: Any, *kinds: type) -> None:
    """Pad the gated MLPs of these classes."""
    for module in list(model.modules()):
        if isinstance(module, kinds):
            pad_mlp(module)


def pad_mlp(mlp: Any) -> None:
    """Pad the width of a gated MLP to a multiple of 64; the vision tower's width of 3420 is half as fast unpadded."""
    num_zeros = -mlp.gate_proj.out_features % _ALIGNMENT
    if num_zeros:
        mlp.gate_proj = AlignedLinear(mlp.gate_proj, 0, num_zeros)
        mlp.up_proj = AlignedLinear(mlp.up_proj, 0, num_zeros)
        mlp.down_proj = AlignedLinear(mlp.down_proj, num_zeros, 0)


def replace_norms(model: Any, *kinds: type) -> None:
    """Replace the RMS norms of these classes, which have a `weight` and a `variance_epsilon`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                norm: Any = child
                setattr(parent, name, FusedRMSNorm(norm.weight, norm.variance_epsilon))
