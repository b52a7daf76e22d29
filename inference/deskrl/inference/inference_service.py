"""Inference service: implements `Act` and `GetModelInfo` of inference.proto."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from deskrl.core import prompt_rendering
from deskrl.core.config import RunConfig
from deskrl.core.rpc import protocol_mismatch, service_status
from deskrl.inference import metrics
from deskrl.inference.engine_prompt import EnginePrompt
from deskrl.inference.image_cache import ImageCache, ImageError
from deskrl.inference.image_preprocessing import PatchProcessor
from deskrl.inference.served_version import span_messages
from deskrl.inference.vllm_engine import EngineDead, ModelSpec, SampledOutput, VllmEngine
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from deskrl.inference.image_preprocessing import ImagePatches

Context = grpc.aio.ServicerContext[Any, Any]

# vLLM replaces lower temperatures by others.
_MIN_TEMPERATURE = 0.01


class RequestRejected(Exception):
    """The request cannot be served; `code` is the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModelProcessor:
    """Tokenizer and image processor of the served model, and what follows from them."""

    def __init__(self, model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.patch_processor = PatchProcessor(model_folder)
        self.model_spec = ModelSpec(
            image_token_id=prompt_rendering.image_token_id(tokenizer),
            end_of_turn_id=prompt_rendering.end_of_turn_id(tokenizer),
            suppressed_ids=prompt_rendering.suppressed_ids(tokenizer, prompt_rendering.read_vocab_size(model_folder)),
            normalisation_table=self.patch_processor.normalisation_table(),
        )
        self.processor_hash = prompt_rendering.processor_hash(model_folder, tokenizer)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class PromptBuilder:
    """Builds engine prompts from conversations: renders the text and looks up the screenshots."""

    def __init__(self, config: RunConfig, model_processor: ModelProcessor) -> None:
        self._max_images = config.inference.max_images
        self._max_tokens = config.inference.max_model_len
        self._processor = model_processor
        self._image_cache = ImageCache(model_processor.patch_processor.patches, config.inference.image_cache_bytes)

    async def build(
        self,
        messages: Iterable[inference_pb2.ChatMessage],
        images: Iterable[common_pb2.Image],
        num_new_tokens: int,
    ) -> EnginePrompt | list[str]:
        """Build the prompt of a conversation.

        Args:
            messages: conversation.
            images: screenshots that were sent with it.
            num_new_tokens: number of tokens that must fit behind the prompt.

        Returns:
            The prompt, or the hashes of missing screenshots.

        Raises:
            RequestRejected: images or messages are malformed, or the prompt is too long.
        """
        # Started first, so that threads preprocess the screenshots while this one renders the text.
        tasks = {image.hash: asyncio.ensure_future(self._image_cache.add(image.hash, image.data)) for image in images}
        try:
            rendered = prompt_rendering.render_prompt(list(messages), self._processor.tokenizer)
            # Screenshots of this request are used even if they do not fit into the cache.
            sent = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        except (ImageError, prompt_rendering.RenderingError) as error:
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        found = {name: sent.get(name) or self._image_cache.get(name) for name in rendered.image_hashes}
        if missing := [name for name, patches in found.items() if patches is None]:
            return missing
        pairs = [(name, patches) for name in rendered.image_hashes if (patches := found[name]) is not None]
        self._check_length(rendered.ids, [patches for _, patches in pairs], num_new_tokens)
        return EnginePrompt(rendered.ids, pairs)

    def _check_length(self, ids: tuple[int, ...], images: list[ImagePatches], num_new_tokens: int) -> None:
        if len(images) > self._max_images:
            message = f"{len(images)} screenshots exceed inference.max_images ({self._max_images})"
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, message)
        image_tokens = sum(patches.num_tokens - 1 for patches in images)
        if len(ids) + image_tokens + num_new_tokens > self._max_tokens:
            message = (
                f"a prompt of {len(ids) + image_tokens} tokens and an action of {num_new_tokens} tokens exceed "
                f"inference.max_model_len ({self._max_tokens})"
            )
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, message)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves actions that one engine samples."""

    def __init__(
        self,
        config: RunConfig,
        engine: VllmEngine,
        model_processor: ModelProcessor,
        prompt_builder: PromptBuilder,
        on_engine_death: Callable[[], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._processor = model_processor
        self._prompt_builder = prompt_builder
        self._on_engine_death = on_engine_death
        self._started_s = time.monotonic()

    async def Act(self, request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        """Sample one action; see inference.proto."""
        started_s = time.perf_counter()
        try:
            self._check_request(request)
            prompt = await self._prompt_builder.build(request.messages, request.images, request.max_tokens)
            if isinstance(prompt, list):
                metrics.ACTS.labels("missing_images").inc()
                return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=prompt))
            image_ms = (time.perf_counter() - started_s) * 1e3
            with metrics.RUNNING_ACTS.track_inprogress():
                sampled = await self._engine.sample(
                    prompt,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    name=request.request_id,
                )
        except RequestRejected as rejection:
            metrics.ACTS.labels("refused").inc()
            await _abort(context, rejection)
        except EngineDead as error:
            metrics.ACTS.labels("engine_dead").inc()
            self._on_engine_death()
            await _abort(context, RequestRejected(grpc.StatusCode.UNAVAILABLE, str(error)))
        metrics.ACTS.labels("sampled").inc()
        _observe_latency(time.perf_counter() - started_s, image_ms, sampled)
        metrics.PROMPT_TOKENS.inc(len(sampled.prompt_ids))
        metrics.CACHED_PROMPT_TOKENS.inc(sampled.num_cached_tokens)
        metrics.ACTION_TOKENS.inc(len(sampled.action_ids))
        return inference_pb2.ActResponse(action=self._action_message(sampled, image_ms))

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        """Return model, processor, version and limits; see inference.proto."""
        if (mismatch := protocol_mismatch(request.peer)) is not None:
            await _abort(context, RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, mismatch))
        return inference_pb2.GetModelInfoResponse(
            model_path=str(self._config.model_folder),
            processor_hash=self._processor.processor_hash,
            version=self._engine.version.to_message(),
            max_model_len=self._config.inference.max_model_len,
            max_images=self._config.inference.max_images,
            engine=self._engine.name,
            service=service_status(self._started_s),
        )

    def _check_request(self, request: inference_pb2.ActRequest) -> None:
        if (mismatch := protocol_mismatch(request.peer)) is not None:
            raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, mismatch)
        limit = self._config.inference.max_action_tokens
        if not 1 <= request.max_tokens <= limit:
            message = f"max_tokens: must be from 1 to inference.max_action_tokens ({limit}), not {request.max_tokens}"
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, message)
        if request.temperature != 0 and not request.temperature >= _MIN_TEMPERATURE:
            message = f"temperature: must be 0 (greedy) or at least {_MIN_TEMPERATURE}, not {request.temperature}"
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, message)

    def _action_message(self, sampled: SampledOutput, image_ms: float) -> inference_pb2.SampledAction:
        return inference_pb2.SampledAction(
            prompt_ids=sampled.prompt_ids,
            action_ids=sampled.action_ids,
            logprobs=sampled.logprobs,
            versions=span_messages(sampled.spans),
            text=self._processor.decode(sampled.action_ids),
            processor_hash=self._processor.processor_hash,
            stopped=sampled.stopped,
            image_ms=image_ms,
            queue_ms=sampled.queue_ms,
            prefill_ms=sampled.prefill_ms,
            decode_ms=sampled.decode_ms,
        )


def _observe_latency(act_s: float, image_ms: float, sampled: SampledOutput) -> None:
    """Record the latency of an Act call and of its stages."""
    stages_ms = {
        "image": image_ms,
        "queue": sampled.queue_ms,
        "prefill": sampled.prefill_ms,
        "decode": sampled.decode_ms,
    }
    for stage, stage_ms in stages_ms.items():
        metrics.ACT_STAGE_SECONDS.labels(stage).observe(stage_ms / 1e3)
    metrics.ACT_STAGE_SECONDS.labels("rest").observe(act_s - sum(stages_ms.values()) / 1e3)
    metrics.ACT_SECONDS.observe(act_s)


async def _abort(context: Context, rejection: RequestRejected) -> NoReturn:
    await context.abort(rejection.code, str(rejection))
    raise AssertionError("context.abort always raises")
