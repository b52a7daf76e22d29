"""vLLM without deskrl, for comparisons: given token ids and screenshots as they come off the wire, in this process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.core.config import RunConfig
from deskrl.inference.engine_settings import engine_arguments, set_environment
from deskrl.proto.v1 import common_pb2

_OURS = ("weight_transfer_config", "worker_extension_cls", "mm_device_do_normalize")


@dataclass(frozen=True)
class Answer:
    """What was sampled, and on which prompt."""

    prompt_ids: list[int]
    action_ids: list[int]
    logprobs: list[float]


class Peer:
    """A bare engine at the settings of a run, save what deskrl adds."""

    def __init__(self, config: RunConfig, **engine_args: Any) -> None:
        """Start it and wait for it; `engine_args` are vLLM's and win."""
        set_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {key: value for key, value in engine_arguments(config).items() if key not in _OURS}
        arguments |= {"worker_extension_cls": "masking_extension.MaskingExtension"} | engine_args
        usage = UsageContext.OPENAI_API_SERVER
        self.llm = AsyncLLM.from_vllm_config(AsyncEngineArgs(**arguments).create_engine_config(usage_context=usage))

    async def suppress(self, suppressed_ids: Sequence[int]) -> None:
        """Never sample these tokens; to be called once, before the first request."""
        await self.llm.collective_rpc("mask_tokens", args=(list(suppressed_ids),))

    async def sample(
        self, prompt_ids: Sequence[int], images: Sequence[common_pb2.Image], params: Mapping[str, Any], name: str
    ) -> Answer:
        """One action on a prompt that has one image token for each screenshot."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {
            "prompt_token_ids": list(prompt_ids),
            "multi_modal_data": {"image": await asyncio.gather(*(asyncio.to_thread(_decode, one) for one in images))},
            "multi_modal_uuids": {"image": [image.hash for image in images]},
        }
        # In the renderer's threads, where `vllm serve` does it too: `generate` would do it on the event loop.
        (rendered,) = await self.llm.renderer.render_cmpl_async([prompt])
        sampling = SamplingParams(**params, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        async for output in self.llm.generate(rendered, sampling, name):
            completion = output.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [at[token].logprob for token, at in pairs]
        return Answer(list(output.prompt_token_ids), list(completion.token_ids), logprobs)

    def shutdown(self) -> None:
        """End its processes."""
        self.llm.shutdown()


def _decode(image: common_pb2.Image) -> Image.Image:
    return Image.open(io.BytesIO(image.data)).convert("RGB")
