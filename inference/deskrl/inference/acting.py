"""`Act` and `GetModelInfo`: from a conversation to one sampled action. Knows the wire and the prompt, not vLLM."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from deskrl.core import rendering
from deskrl.core.config import RunConfig
from deskrl.core.rpc import protocol_refusal, service_status
from deskrl.inference import metrics
from deskrl.inference.engine import Engine, EngineDead, ModelFacts, Sampled
from deskrl.inference.engine_input import Prompt
from deskrl.inference.images import ImageError, Screenshots
from deskrl.inference.pixels import PixelProcessor
from deskrl.inference.versions import span_messages
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from deskrl.inference.pixels import Patches

Context = grpc.aio.ServicerContext[Any, Any]

# Below this vLLM would sample at another temperature than it was asked for.
_LEAST_TEMPERATURE = 0.01


class RequestRefused(Exception):
    """A request that cannot be served as it is, with its status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class PromptFormat:
    """How the served model is spoken to: its tokenizer, its image processor, their hash, its suppressed tokens."""

    def __init__(self, model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pixels = PixelProcessor(model_folder)
        self.facts = ModelFacts(
            image_token_id=rendering.image_token_id(tokenizer),
            suppressed_ids=rendering.suppressed_ids(tokenizer, rendering.vocab_size_of(model_folder)),
            float_table=self.pixels.float_table(),
        )
        self.processor_hash = rendering.processor_hash(model_folder, tokenizer)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Prompter:
    """Makes engine prompts of conversations: finds the screenshots, renders the text."""

    def __init__(self, config: RunConfig, prompt_format: PromptFormat) -> None:
        self._max_images = config.inference.max_images
        self._max_tokens = config.inference.max_model_len
        self._format = prompt_format
        self._screenshots = Screenshots(prompt_format.pixels.patches, config.inference.image_cache_bytes)

    async def prompt(
        self,
        messages: Iterable[inference_pb2.ChatMessage],
        images: Iterable[common_pb2.Image],
        num_new_tokens: int,
    ) -> Prompt | list[str]:
        """The prompt, or the hashes of the screenshots that it lacks.

        Raises:
            RequestRefused: images or messages are malformed, or it is all too long.
        """
        # Under way before anything else: threads make the screenshots ready while this one renders the text.
        making = {image.hash: asyncio.ensure_future(self._screenshots.add(image.hash, image.data)) for image in images}
        try:
            rendered = rendering.render(list(messages), self._format.tokenizer)
            # What came with this very request is at hand even where there is too little room to keep it.
            sent = dict(zip(making, await asyncio.gather(*making.values()), strict=True))
        except (ImageError, rendering.RenderingError) as error:
            await asyncio.gather(*making.values(), return_exceptions=True)
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        found = {name: sent.get(name) or self._screenshots.get(name) for name in rendered.image_hashes}
        if missing := [name for name, patches in found.items() if patches is None]:
            return missing
        pairs = [(name, patches) for name in rendered.image_hashes if (patches := found[name]) is not None]
        self._check_length(rendered.ids, [patches for _, patches in pairs], num_new_tokens)
        return Prompt(rendered.ids, pairs)

    def _check_length(self, ids: tuple[int, ...], images: list[Patches], num_new_tokens: int) -> None:
        if len(images) > self._max_images:
            message = f"{len(images)} screenshots; inference.max_images is {self._max_images}"
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, message)
        image_tokens = sum(patches.num_tokens - 1 for patches in images)
        if len(ids) + image_tokens + num_new_tokens > self._max_tokens:
            message = (
                f"a prompt of {len(ids) + image_tokens} tokens and an action of {num_new_tokens}; "
                f"inference.max_model_len is {self._max_tokens}"
            )
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, message)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves actions of one engine."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        prompt_format: PromptFormat,
        prompter: Prompter,
        on_engine_death: Callable[[], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._format = prompt_format
        self._prompter = prompter
        self._on_engine_death = on_engine_death
        self._started_s = time.monotonic()

    async def Act(self, request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        """Sample one action; see inference.proto."""
        started = time.perf_counter()
        try:
            self._check(request)
            prompt = await self._prompter.prompt(request.messages, request.images, request.max_tokens)
            if isinstance(prompt, list):
                metrics.ACTS.labels("missing_images").inc()
                return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=prompt))
            image_ms = (time.perf_counter() - started) * 1e3
            with metrics.RUNNING_ACTS.track_inprogress():
                sampled = await self._engine.sample(
                    prompt,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    name=request.request_id,
                )
        except RequestRefused as refusal:
            metrics.ACTS.labels("refused").inc()
            await _abort(context, refusal)
        except EngineDead as error:
            metrics.ACTS.labels("engine_dead").inc()
            self._on_engine_death()
            await _abort(context, RequestRefused(grpc.StatusCode.UNAVAILABLE, str(error)))
        metrics.ACTS.labels("sampled").inc()
        _observe(time.perf_counter() - started, image_ms, sampled)
        metrics.PROMPT_TOKENS.inc(len(sampled.prompt_ids))
        metrics.CACHED_PROMPT_TOKENS.inc(sampled.num_cached_tokens)
        metrics.ACTION_TOKENS.inc(len(sampled.action_ids))
        return inference_pb2.ActResponse(action=self._action(sampled, image_ms))

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        """Say what is served."""
        if (refusal := protocol_refusal(request.peer)) is not None:
            await _abort(context, RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, refusal))
        return inference_pb2.GetModelInfoResponse(
            model_path=str(self._config.model_folder),
            processor_hash=self._format.processor_hash,
            version=self._engine.version.to_message(),
            max_model_len=self._config.inference.max_model_len,
            max_images=self._config.inference.max_images,
            engine=self._engine.name,
            service=service_status(self._started_s),
        )

    def _check(self, request: inference_pb2.ActRequest) -> None:
        if (refusal := protocol_refusal(request.peer)) is not None:
            raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        most = self._config.inference.max_action_tokens
        if not 1 <= request.max_tokens <= most:
            message = f"max_tokens {request.max_tokens}; inference.max_action_tokens is {most}"
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, message)
        if request.temperature != 0 and not request.temperature >= _LEAST_TEMPERATURE:
            message = f"temperature {request.temperature}; it is 0 (greedy) or at least {_LEAST_TEMPERATURE}"
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, message)

    def _action(self, sampled: Sampled, image_ms: float) -> inference_pb2.SampledAction:
        return inference_pb2.SampledAction(
            prompt_ids=sampled.prompt_ids,
            action_ids=sampled.action_ids,
            logprobs=sampled.logprobs,
            versions=span_messages(sampled.spans),
            text=self._format.decode(sampled.action_ids),
            processor_hash=self._format.processor_hash,
            stopped=sampled.stopped,
            image_ms=image_ms,
            queue_ms=sampled.queue_ms,
            prefill_ms=sampled.prefill_ms,
            decode_ms=sampled.decode_ms,
        )


def _observe(act_s: float, image_ms: float, sampled: Sampled) -> None:
    """Report where the time of an action went."""
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


async def _abort(context: Context, refusal: RequestRefused) -> NoReturn:
    await context.abort(refusal.code, str(refusal))
    raise AssertionError("context.abort returns never")
