"""What is mended in vLLM until a release does it. Each mend says what goes wrong without it, and which test shows it.

Imported into the engine's process by `transfer`; a release without the named function has nothing to be mended.
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


def _keep_all(mm_features: Any, *_: Any, **__: Any) -> Any:
    return mm_features


# vLLM 0.32 does not hand a worker the pixels of screenshots whose tokens are in the prefix cache. A weight update
# empties that cache and has the kept requests computed anew, for which the worker lacks the pixels: the engine dies.
# test_inference_replica: a later step of an episode goes on under new vision weights.
if hasattr(output, "strip_covered_mm_data"):
    output.strip_covered_mm_data = _keep_all


_one_by_one = mm_encoder_attention.vit_torch_sdpa_wrapper


def _together(q: Any, k: Any, v: Any, scale: Any = None, cu_seqlens: Any = None, enable_gqa: bool = False) -> Any:
    attention = _one_by_one if torch.compiler.is_compiling() else window_attention
    return attention(q, k, v, scale, cu_seqlens, enable_gqa)


# Where a vision tower attends by PyTorch's kernels (`TORCH_SDPA`: on CPUs, and where FlashAttention is not installed),
# vLLM 0.26 to 0.32 calls one kernel for each window of each layer, and waits for the device in each layer: most of the
# time of a new screenshot. test_inference_window_attention: the same numbers; tests/bench/gpu_inference.py: the time.
mm_encoder_attention.vit_torch_sdpa_wrapper = _together


def _leaving_discarded_generators_alone(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def sample(runner: Any, *arguments: Any) -> Any:
        batch = runner.input_batch
        in_parts = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        aside = {row: batch.generators.pop(row) for row in in_parts.tolist() if row in batch.generators}
        try:
            return sample_tokens(runner, *arguments)
        finally:
            batch.generators.update(aside)

    return sample


# A prompt of which only a part fits into a step has a token sampled that is discarded, and its generator is set back by
# an offset, which a CPU's has not: vLLM 0.32's engine dies as soon as prompts at once have more tokens than a step.
# test_inference_engine: who is taken in parts acts as alone.
if current_platform.is_cpu():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # a CPU's runner is one of these

    GPUModelRunner.sample_tokens = _leaving_discarded_generators_alone(GPUModelRunner.sample_tokens)
