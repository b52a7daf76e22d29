"""Checks whether one of vLLM's encoder attentions runs on this GPU and agrees with PyTorch's; exits with 0 if so.

    python tests/kit/attention_probe.py FLASH_ATTN|TRITON_ATTN

The shapes are those of Qwen2.5-VL-7B and a screenshot of 1280 x 720: head size 80, windows of at most 64 patches.
"""

from __future__ import annotations

import sys

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.ops.vit_attn_wrappers import (
    vit_flash_attn_wrapper,
    vit_torch_sdpa_wrapper,
    vit_triton_attn_wrapper,
)

NUM_HEADS, HEAD_SIZE = 16, 80
WINDOWS = [64] * 66 + [32] * 17 + [16]
TOLERANCE = 2e-2


def main(name: str) -> None:
    """Run the attention and compare its result with PyTorch's."""
    torch.manual_seed(0)
    length = sum(WINDOWS)
    q, k, v = torch.randn(3, 1, length, NUM_HEADS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    scale = HEAD_SIZE**-0.5
    for lengths in (WINDOWS, [length]):
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        max_seqlen = torch.tensor(max(lengths), dtype=torch.int32)
        expected = vit_torch_sdpa_wrapper(q, k, v, scale, cu_seqlens)
        if name == "FLASH_ATTN":
            version = get_flash_attn_version(head_size=HEAD_SIZE)
            if version is None:
                raise SystemExit("vLLM has no FlashAttention for this GPU")
            result = vit_flash_attn_wrapper(q, k, v, 1, False, version, scale, cu_seqlens, max_seqlen)
        else:
            result = vit_triton_attn_wrapper(q, k, v, 1, scale, cu_seqlens, max_seqlen)
        torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


if __name__ == "__main__":
    main(sys.argv[1])
