"""vLLM without deskrl for comparisons: runs in this process, and gets token ids and encoded screenshots."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from masking_extension import MaskingExtension
from PIL import Image

from deskrl.core.config import RunConfig
from deskrl.inference.engine_args import set_vllm_environment, vllm_engine_args
from deskrl.proto.v1 import common_pb2

_DESKRL_ARGS = ("weight_transfer_config", "worker_extension_cls", "mm_device_do_normalize")


@dataclass(frozen=True)
class BareOutput:
    """Sampled action and its expanded prompt."""

    prompt_ids: list[int]
    action_ids: list[int]
    logprobs: list[float]


class BareVllm:
    """Engine with the settings of a run except those that deskrl adds."""

    def __init__(self, config: RunConfig, **engine_args: Any) -> None:
        """Start the engine and wait until it is ready; `engine_args` override the settings of the run."""
        set_vllm_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            key: value for key, value in vllm_engine_args(config).items() if key not in _DESKRL_ARGS
        }
        arguments |= {
            "worker_extension_cls": f"{MaskingExtension.__module__}.{MaskingExtension.__qualname__}"
        } | engine_args
        usage = UsageContext.OPENAI_API_SERVER
        self.llm = AsyncLLM.from_vllm_config(AsyncEngineArgs(**arguments).create_engine_config(usage_context=usage))

    async def suppress(self, suppressed_ids: Sequence[int]) -> None:
        """Suppress these tokens; call once, before the first request."""
        await self.llm.collective_rpc("mask_tokens", args=(list(suppressed_ids),))

    async def sample(
        self, prompt_ids: Sequence[int], images: Sequence[common_pb2.Image], params: Mapping[str, Any], name: str
    ) -> BareOutput:
        """Sample one action after a prompt with one image token per screenshot."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {
            "prompt_token_ids": list(prompt_ids),
            "multi_modal_data": {"image": await asyncio.gather(*(asyncio.to_thread(_decode, one) for one in images))},
            "multi_modal_uuids": {"image": [image.hash for image in images]},
        }
        # Renders in the threads of the renderer, as `vllm serve` does; `generate` would block the event loop.
        (rendered,) = await self.llm.renderer.render_cmpl_async([prompt])
        sampling = SamplingParams(**params, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        async for output in self.llm.generate(rendered, sampling, name):
            completion = output.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [at[token].logprob for token, at in pairs]
        return BareOutput(list(output.prompt_token_ids), list(completion.token_ids), logprobs)

    def shutdown(self) -> None:
        """Terminate the processes of the engine."""
        self.llm.shutdown()


def _decode(image: common_pb2.Image) -> Image.Image:
    return Image.open(io.BytesIO(image.data)).convert("RGB")
