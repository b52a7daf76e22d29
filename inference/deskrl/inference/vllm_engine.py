"""Inference engine: wraps vLLM's AsyncLLM for sampling, scoring and weight updates."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core import process_lifecycle
from deskrl.core.config import RunConfig
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.inference.engine_args import set_vllm_environment, vllm_engine_args
from deskrl.inference.engine_prompt import EnginePrompt, to_vllm_input
from deskrl.inference.served_version import INITIAL_VERSION, ServedVersion, SpanTracker, VersionedSpan
from deskrl.inference.weight_staging import TransferResult, merge_results

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.inputs import MultiModalInput, TokensInput
    from vllm.v1.engine.async_llm import AsyncLLM

    from deskrl.inference.image_preprocessing import NormalisationTable
    from deskrl.proto.v1.weights_pb2 import TensorSpec


class EngineDead(Exception):
    """The processes of the engine have ended; the replica can no longer serve."""


@dataclass(frozen=True)
class ModelSpec:
    """Properties of the policy that the engine needs beyond its weights."""

    image_token_id: int
    """Token id that represents a part of a screenshot."""
    end_of_turn_id: int
    """Token id that ends an action."""
    suppressed_ids: Sequence[int]
    """Token ids that are never sampled."""
    normalisation_table: NormalisationTable
    """Table that converts the bytes of screenshots to floats."""


@dataclass(frozen=True)
class SampledOutput:
    """Sampled action and its expanded prompt."""

    prompt_ids: Sequence[int]
    action_ids: Sequence[int]
    logprobs: Sequence[float]
    spans: Sequence[VersionedSpan]
    stopped: bool
    """Whether the action ended with the end-of-turn token."""
    num_cached_tokens: int
    """Number of prompt tokens that were found in the prefix cache."""
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class VllmEngine:
    """One vLLM engine. `version` is the policy version under which new tokens are sampled."""

    def __init__(self, llm: AsyncLLM, model_spec: ModelSpec) -> None:
        """Wrap a running engine.

        Args:
            llm: vLLM engine.
            model_spec: properties of the policy.
        """
        from vllm.outputs import CompletionOutput

        self.llm = llm
        self.version = INITIAL_VERSION
        self._image_token_id = model_spec.image_token_id
        self._end_of_turn_id = model_spec.end_of_turn_id
        # Since 0.32 vLLM reports under which label each token was sampled.
        self._has_version_labels = "weight_versions" in CompletionOutput.__dataclass_fields__
        self._request_numbers = itertools.count()
        self._trackers: dict[str, SpanTracker] = {}

    @classmethod
    async def start(cls, config: RunConfig, model_spec: ModelSpec) -> VllmEngine:
        """Start the processes of vLLM and wait until they are ready to sample.

        Raises:
            UserError: vLLM rejects the model or the settings.
        """
        set_vllm_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        # The processes of vLLM end with this role, which itself ends with its supervisor.
        os.environ |= process_lifecycle.supervised_environment()
        try:
            # vLLM's default batch size is larger for a server than for an unknown use.
            usage = UsageContext.OPENAI_API_SERVER
            engine_config = AsyncEngineArgs(**vllm_engine_args(config)).create_engine_config(usage_context=usage)
        except (TypeError, ValueError) as error:
            raise rejection(config.model_folder, error) from error
        engine = cls(AsyncLLM.from_vllm_config(engine_config), model_spec)
        table = model_spec.normalisation_table
        await engine.llm.collective_rpc(
            "deskrl_set_up_policy", args=(list(model_spec.suppressed_ids), table.values, table.num_frames)
        )
        await engine.set_version(INITIAL_VERSION)
        return engine

    @property
    def name(self) -> str:
        """Name and version of the engine, for `GetModelInfo`."""
        from vllm import __version__

        return f"vllm {__version__}"

    @property
    def num_running(self) -> int:
        """Number of unfinished requests."""
        return len(self._trackers)

    async def sample(
        self, prompt: EnginePrompt, *, temperature: float, max_tokens: int, seed: int, name: str
    ) -> SampledOutput:
        """Sample one action.

        Args:
            prompt: prompt of the action.
            temperature: sampling temperature; 0 for greedy sampling.
            max_tokens: maximum length of the action.
            seed: seed of the random generator.
            name: name of the request, for logs.

        Raises:
            EngineDead: the engine has died.
        """
        from vllm import SamplingParams

        # The worker suppresses tokens for all requests.
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=[self._end_of_turn_id],  # vLLM itself stops at `eos_token` only
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )
        output, spans = await self._generate(prompt, params, name)
        completion = output.outputs[0]
        if self._has_version_labels and (labelled := completion.weight_versions) is not None:
            spans = tuple(
                VersionedSpan(ServedVersion.from_label(span.version), span.start, span.end) for span in labelled
            )
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return SampledOutput(
            prompt_ids=output.prompt_token_ids,
            action_ids=list(completion.token_ids),
            logprobs=[at[token].logprob for token, at in pairs],
            spans=spans,
            stopped=completion.finish_reason == "stop",
            num_cached_tokens=output.num_cached_tokens or 0,
            **_timings_ms(output.metrics),
        )

    async def score(self, prompt: EnginePrompt, continuation_ids: Sequence[int], name: str) -> list[float]:
        """Return the logprobs of a given continuation at temperature 1, without suppression of tokens."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        whole = EnginePrompt([*prompt.ids, *continuation_ids], prompt.images)
        scored, _ = await self._generate(whole, params, name)
        tail = scored.prompt_logprobs[-len(continuation_ids) :]
        return [at[token].logprob for token, at in zip(continuation_ids, tail, strict=True)]

    async def _generate(
        self, prompt: EnginePrompt, params: Any, name: str
    ) -> tuple[RequestOutput, tuple[VersionedSpan, ...]]:
        """Return the finished output of one request and the version of each of its tokens.

        Raises:
            EngineDead: the engine has died.
            RuntimeError: vLLM fails on this request.
        """
        # vLLM considers a screenshot cached in the worker as soon as a request with it is submitted. If that request
        # is cancelled on the way, the next one with this screenshot fails and is repeated with all screenshots.
        for resend in (False, True):
            inputs = to_vllm_input(self.llm.input_processor, prompt, self._image_token_id, resend=resend)
            output, spans = await self._generate_once(inputs, params, name)
            if output.outputs[0].finish_reason != "error":
                return output, spans
        raise RuntimeError(f"vLLM failed on request {name}")

    async def _generate_once(
        self, inputs: MultiModalInput | TokensInput, params: Any, name: str
    ) -> tuple[RequestOutput, tuple[VersionedSpan, ...]]:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params.output_kind = RequestOutputKind.FINAL_ONLY
        unique_name = f"{name}#{next(self._request_numbers)}"
        tracker = self._trackers[unique_name] = SpanTracker()
        try:
            async for output in self.llm.generate(inputs, params, unique_name):
                finished = output
        except EngineDeadError as error:
            raise EngineDead("the engine process of vLLM has died") from error
        finally:
            del self._trackers[unique_name]
        tracker.advance_to(self.version, len(finished.outputs[0].token_ids))
        return finished, tracker.spans()

    async def pause(self) -> int:
        """Pause sampling and retain the running requests; return their number."""
        # `clear_caches` clears the caches, because it depends on the new weights which of them remain valid.
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        return self.num_running

    async def load(self, path: str) -> None:
        """Load all weights from a safetensors file; only while paused."""
        await self._update_weights({"path": path})

    async def gpu_uuids(self) -> list[str]:
        """Return the UUID of each worker's GPU; empty on a CPU."""
        return [uuid for uuid in await self.llm.collective_rpc("deskrl_gpu_uuid") if uuid]

    async def join(self, communicator_id: bytes) -> None:
        """Start to join an NCCL communicator with the learner; sampling continues."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info={"communicator_id": communicator_id.hex()})
        await self.llm.init_weight_transfer_engine(request)

    async def receive(self, source: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> TransferResult:
        """Load all weights directly from the learner's GPU; only while paused.

        Args:
            source: fields of `vllm_weight_engine.UpdateInfo` that select and configure the transport.
            tensors: tensors of the model's checkpoint, in the order of transfer.
        """
        await self._update_weights(
            {
                **source,
                "names": [tensor.name for tensor in tensors],
                "dtypes": [tensor.dtype for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
        )
        return merge_results(await self.llm.collective_rpc("deskrl_transfer_result"))

    async def _update_weights(self, update: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.start_weight_update()
        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        await self.llm.finish_weight_update()

    async def clear_caches(self, *, vision_changed: bool) -> None:
        """Discard cached results of the old weights while paused; retained requests are recomputed from their tokens.

        Args:
            vision_changed: whether the weights of the vision tower have changed, so that image embeddings are invalid.
        """
        await self.llm.reset_prefix_cache(reset_running_requests=True)
        if vision_changed:
            await self.llm.reset_encoder_cache()

    async def resume(self) -> None:
        """Resume sampling."""
        await self.llm.resume_generation()

    async def set_version(self, version: ServedVersion) -> None:
        """Set the policy version of the loaded weights; only while paused, or before the first request."""
        if self._has_version_labels:
            await self.llm.update_weight_version(str(version))
        # The engine is paused, so all existing tokens were sampled under the previous version.
        for state in self.llm.output_processor.request_states.values():
            if (tracker := self._trackers.get(state.external_req_id)) is not None:
                tracker.advance_to(self.version, state.detokenizer.num_output_tokens())
        self.version = version

    def shutdown(self) -> None:
        """Terminate the processes of vLLM and wait until they have ended."""
        self.llm.shutdown()
        # Its finalizer shuts down again, which fails during the shutdown of the interpreter.
        del self.llm


def rejection(model_folder: Path, error: Exception) -> UserError:
    """Return the message for an error of vLLM before its start: it lacks the architecture, or rejects a setting."""
    from vllm import ModelRegistry, __version__

    model_classes = read_json_object(model_folder / "config.json", "copy it again").get("architectures") or ()
    unknown = sorted(set(model_classes) - set(ModelRegistry.get_supported_archs()))
    if unknown:
        return UserError(
            f"{model_folder}: vLLM {__version__} cannot serve {' or '.join(unknown)}: {one_line(error, 160)}",
            "install a version of vLLM that supports the architecture",
        )
    return UserError(
        f"vLLM rejects the settings of the inference section: {one_line(error)}",
        "possibly correct inference.engine_args, inference.dtype or inference.max_model_len",
    )


def _timings_ms(metrics: Any) -> dict[str, float]:
    """Return the latency of queue, prefill and decoding; zeros if vLLM reports no metrics."""
    if metrics is None or not metrics.first_token_ts:
        return {"queue_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 0.0}
    return {
        "queue_ms": (metrics.scheduled_ts - metrics.queued_ts) * 1e3,
        "prefill_ms": (metrics.first_token_ts - metrics.scheduled_ts) * 1e3,
        "decode_ms": (metrics.last_token_ts - metrics.first_token_ts) * 1e3,
    }
