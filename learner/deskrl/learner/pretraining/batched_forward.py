"""Forward pass of Qwen2.5-VL over a batch of screens of one size, on the modules of transformers.

It computes what transformers' own forward pass computes, several times as fast: that one attends to one screen after
another, and processes each picture twice, as two frames of a video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deskrl.learner.pretraining.answer_sequences import Sequences, merge_order
from deskrl.learner.pretraining.rendering import PATCH

_EPSILON = 1e-6
_Block = Callable[..., Tensor]


@dataclass(frozen=True)
class Hidden:
    """Hidden states of a forward pass."""

    patches: Tensor
    """Output of the vision blocks, in the order of the processor, with shape (screens, patches, width)."""
    cells: Tensor
    """Image tokens at the depth of the dense targets, with shape (screens, image tokens, width)."""
    answer: Tensor
    """Normalised last hidden states from which the answer's tokens are predicted."""


class BatchedForward:
    """Forward pass of one model.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration whose vision blocks all attend to the whole screen.
        dtype: type of activations.
        dense_depth: number of language layers after which image tokens are returned.
        is_compiled: whether blocks are compiled.
    """

    def __init__(self, model: Any, dtype: torch.dtype, dense_depth: int, is_compiled: bool) -> None:
        self._model = model
        self._dtype = dtype
        self._dense_depth = dense_depth
        compiled: Callable[[_Block], _Block] = (
            partial(torch.compile, dynamic=False) if is_compiled else lambda block: block
        )
        self._vision_block = compiled(_vision_block)
        self._text_block = compiled(_text_block)
        self._embed = compiled(_embed_patches)
        self._vision = model.model.visual
        self._text = model.model.language_model
        self._vision_heads = self._vision.config.num_heads
        self._text_heads = self._text.config.num_attention_heads
        # Parameters are looked up once: walking through modules takes longer than small blocks.
        self._vision_weights = [_vision_weights(block) for block in self._vision.blocks]
        self._text_weights = [_text_weights(layer) for layer in self._text.layers]

    def see(self, pictures: Tensor) -> Tensor:
        """Return the outputs of the vision blocks for pictures (screens, 3, height, width) from 0 to 1."""
        _, _, height, width = pictures.shape
        rows, columns = height // PATCH, width // PATCH
        x = self._embed(pictures, self._vision.patch_embed.proj.weight, self._dtype)
        cos, sin = self._vision_angles(rows, columns, pictures.device)
        for weights in self._vision_weights:
            x = self._vision_block(x, cos, sin, self._vision_heads, *weights)
        return x

    def __call__(self, pictures: Tensor, sequences: Sequences) -> Hidden:
        """Return the hidden states of a batch."""
        patches = self.see(pictures)
        merger = self._vision.merger
        merged = _norm(patches, merger.ln_q.weight).flatten(1).view(len(patches), patches.shape[1] // 4, -1)
        cells = _linear(F.gelu(_linear(merged, merger.mlp[0])), merger.mlp[2])
        # The memory-efficient attention kernel needs a length that is a multiple of 8.
        surplus = -(sequences.before.shape[1] + cells.shape[1] + sequences.after.shape[1]) % 8
        before = F.embedding(F.pad(sequences.before, (surplus, 0)), self._text.embed_tokens.weight).to(self._dtype)
        after = F.embedding(sequences.after, self._text.embed_tokens.weight).to(self._dtype)
        x = torch.cat([before, cells, after], 1)
        num_before, num_cells = before.shape[1], cells.shape[1]
        rows, columns = pictures.shape[2] // (2 * PATCH), pictures.shape[3] // (2 * PATCH)
        cos, sin = self._text_angles(num_before, rows, columns, after.shape[1], x.device)
        mask = _mask(sequences.num_padding + surplus, x.shape[1])
        dense = x
        for depth, weights in enumerate(self._text_weights, start=1):
            x = self._text_block(x, cos, sin, mask, self._text_heads, *weights)
            if depth == self._dense_depth:
                dense = x
        last = x[:, -sequences.num_answer - 1 : -1]
        return Hidden(patches, dense[:, num_before : num_before + num_cells], _norm(last, self._text.norm.weight))

    def logits(self, answer: Tensor) -> Tensor:
        """Return logits of normalised hidden states."""
        return F.linear(answer, self._model.lm_head.weight.to(answer.dtype))

    def _vision_angles(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        place = torch.stack(
            torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"), -1
        )
        return self._angles(self._vision.rotary_pos_emb(torch.zeros(1, device=device), merge_order(place[None])[0]))

    def _text_angles(
        self, num_before: int, rows: int, columns: int, num_after: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of M-RoPE. Padding shifts all positions of a row alike, which changes nothing."""
        text = torch.arange(num_before, device=device).expand(3, -1)
        row = torch.arange(rows, device=device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=device).expand(rows, columns).flatten()
        image = torch.stack([torch.zeros_like(row), row, column]) + num_before
        rest = torch.arange(num_after, device=device).expand(3, -1) + num_before + max(rows, columns)
        positions = torch.cat([text, image, rest], 1)[:, None]
        cos, sin = self._text.rotary_emb(torch.zeros(1, device=device), positions)
        return self._angles((cos[0], sin[0]))

    def _angles(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = pair
        return cos.float(), sin.float()


def _vision_weights(block: Any) -> tuple[Tensor, ...]:
    attention, mlp = block.attn, block.mlp
    linears = (attention.qkv, attention.proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (block.norm1.weight, block.norm2.weight, *(part for item in linears for part in (item.weight, item.bias)))


def _text_weights(layer: Any) -> tuple[Tensor, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        *(part for item in (attention.q_proj, attention.k_proj, attention.v_proj) for part in (item.weight, item.bias)),
        *(item.weight for item in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _embed_patches(pictures: Tensor, kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return embedded patches; both frames of a still picture are the same, so their kernels are added."""
    num_screens, channels, height, width = pictures.shape
    patches = pictures.view(num_screens, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    patches = merge_order(patches.permute(0, 2, 4, 1, 3, 5)).flatten(2)
    return F.linear((2 * patches - 1).to(dtype), kernel.sum(2).flatten(1).to(dtype))


def _vision_block(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, norm1: Tensor, norm2: Tensor, *linears: Tensor
) -> Tensor:
    qkv_w, qkv_b, proj_w, proj_b, gate_w, gate_b, up_w, up_b, down_w, down_b = (part.to(x.dtype) for part in linears)
    batch, length, width = x.shape
    qkv = F.linear(_norm(x, norm1), qkv_w, qkv_b).view(batch, length, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), proj_w, proj_b)
    y = _norm(x, norm2)
    return x + F.linear(F.silu(F.linear(y, gate_w, gate_b)) * F.linear(y, up_w, up_b), down_w, down_b)


def _text_block(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, heads: int, norm1: Tensor, norm2: Tensor, *linears: Tensor
) -> Tensor:
    q_w, q_b, k_w, k_b, v_w, v_b, out_w, gate_w, up_w, down_w = (part.to(x.dtype) for part in linears)
    batch, length, width = x.shape
    y = _norm(x, norm1)
    q, k, v = (
        F.linear(y, weight, bias).view(batch, length, heads, width // heads).transpose(1, 2)
        for weight, bias in ((q_w, q_b), (k_w, k_b), (v_w, v_b))
    )
    mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, attn_mask=mask)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), out_w)
    y = _norm(x, norm2)
    return x + F.linear(F.silu(F.linear(y, gate_w)) * F.linear(y, up_w), down_w)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPSILON) * weight.float()).to(x.dtype)


def _linear(x: Tensor, module: Any) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _mask(num_padding: Tensor, length: int) -> Tensor:
    """Return which keys a query sees, with shape (screens, 1, length, length); padding sees itself."""
    place = torch.arange(length, device=num_padding.device)
    seen = (place[None, :] <= place[:, None]) & (place >= num_padding[:, None, None])
    return (seen | torch.eye(length, dtype=torch.bool, device=place.device))[:, None]
