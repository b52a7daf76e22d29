"""Patches of vLLM until a release makes them unnecessary.

The comment above each patch says what goes wrong without it and which test shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.attention import mm_encoder_attention
from vllm.platforms import current_platform
from vllm.v1.core.sched import output

from deskrl.inference.window_attention import window_attention


def apply_patches() -> None:
    """Patch vLLM in this process; call once, before the engine is created."""
    # vLLM 0.32 does not send a worker the pixels of screenshots whose tokens are in the prefix cache. A weight update
    # clears that cache and recomputes the retained requests. Their pixels are then missing, and the engine dies.
    # tests/system/test_inference_replica.py: test_a_later_step_of_an_episode_continues_under_new_vision_weights
    if hasattr(output, "strip_covered_mm_data"):
        output.strip_covered_mm_data = _keep_all

    # If a vision tower uses PyTorch's kernels (`TORCH_SDPA`: on CPUs, and without FlashAttention), vLLM 0.26 to 0.32
    # launches one kernel per window and layer, and synchronises with the device in each layer. This takes most of the
    # time of a new screenshot.
    # tests/unit/test_inference_window_attention.py (equal results), tests/bench/gpu_inference.py (time)
    mm_encoder_attention.vit_torch_sdpa_wrapper = _batched_windows(mm_encoder_attention.vit_torch_sdpa_wrapper)

    # A prompt that is only partly computed in a step gets a token that is discarded, after which vLLM sets back the
    # offset of its random generator. Generators on CPU have no offset: the engine of vLLM 0.32 dies as soon as
    # concurrent prompts have more tokens than fit into a step.
    # tests/system/test_inference_engine.py: partly_computed_prompts_get_the_actions_that_they_get_alone
    if current_platform.is_cpu():
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # base class of the CPU runner

        GPUModelRunner.sample_tokens = _without_discarded_generators(GPUModelRunner.sample_tokens)


def _keep_all(mm_features: Any, *_: Any, **__: Any) -> Any:
    return mm_features


def _batched_windows(original: Callable[..., Any]) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any, scale: Any = None, cu_seqlens: Any = None, enable_gqa: bool = False) -> Any:
        attention = original if torch.compiler.is_compiling() else window_attention
        return attention(q, k, v, scale, cu_seqlens, enable_gqa)

    return attend


def _without_discarded_generators(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def sample(runner: Any, *arguments: Any) -> Any:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        removed = {row: batch.generators.pop(row) for row in discarded.tolist() if row in batch.generators}
        try:
            return sample_tokens(runner, *arguments)
        finally:
            batch.generators.update(removed)

    return sample
