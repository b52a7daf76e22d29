"""The engine: vLLM's AsyncLLM behind the few calls that deskrl makes of it.

Knows vLLM, token ids, screenshots as patches, labels and files; knows no conversation, no gRPC and no learner.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deskrl.core import lifetime
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.inference.engine_input import Prompt, engine_input
from deskrl.inference.engine_settings import engine_arguments, set_environment
from deskrl.inference.versions import INITIAL, Span, SpanCounter, Version
from deskrl.inference.weights import Received, merge_received

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.inputs import MultiModalInput, TokensInput
    from vllm.v1.engine.async_llm import AsyncLLM

    from deskrl.inference.pixels import FloatTable
    from deskrl.proto.v1.weights_pb2 import TensorSpec


class EngineDead(Exception):
    """The engine's processes are gone; this replica cannot serve any more."""


@dataclass(frozen=True)
class ModelFacts:
    """What the engine needs to know of the policy beyond its weights."""

    image_token_id: int
    """Stands for a part of a screenshot."""
    suppressed_ids: Sequence[int]
    """Never sampled."""
    float_table: FloatTable
    """What the bytes of screenshots become."""


@dataclass(frozen=True)
class Sampled:
    """What the engine sampled, and on which prompt."""

    prompt_ids: Sequence[int]
    action_ids: Sequence[int]
    logprobs: Sequence[float]
    spans: Sequence[Span]
    stopped: bool
    num_cached_tokens: int
    """Of the prompt, that the prefix cache held already."""
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Engine:
    """One vLLM engine. `version` is what new tokens are sampled under."""

    def __init__(self, llm: AsyncLLM, image_token_id: int) -> None:
        """Wrap an engine that runs.

        Args:
            llm: the engine.
            image_token_id: stands for a part of a screenshot.
        """
        from vllm.outputs import CompletionOutput

        self.llm = llm
        self.version = INITIAL
        self._image_token_id = image_token_id
        # From 0.32 on vLLM itself says which token was sampled under which label.
        self._engine_counts = "weight_versions" in CompletionOutput.__dataclass_fields__
        self._numbers = itertools.count()
        self._counters: dict[str, SpanCounter] = {}

    @classmethod
    async def start(cls, config: RunConfig, facts: ModelFacts) -> Engine:
        """Start vLLM's processes, and wait until they can sample.

        Raises:
            UserError: vLLM refuses the model or the settings.
        """
        set_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        # Who the processes below follow is this role, which follows its own supervisor.
        os.environ |= lifetime.supervised_environment()
        try:
            # As a server: vLLM's batches are larger then than it makes them where it knows nothing of its use.
            usage = UsageContext.OPENAI_API_SERVER
            engine_config = AsyncEngineArgs(**engine_arguments(config)).create_engine_config(usage_context=usage)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM refuses these settings: {reason}", "mend the inference section") from error
        engine = cls(AsyncLLM.from_vllm_config(engine_config), facts.image_token_id)
        table = facts.float_table
        await engine.llm.collective_rpc(
            "deskrl_set_up_policy", args=(list(facts.suppressed_ids), table.values, table.num_frames)
        )
        await engine.set_version(INITIAL)
        return engine

    @property
    def name(self) -> str:
        """Engine and version, for `GetModelInfo`."""
        from vllm import __version__

        return f"vllm {__version__}"

    @property
    def num_running(self) -> int:
        """Requests that were begun and have not ended."""
        return len(self._counters)

    async def sample(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int, name: str) -> Sampled:
        """Sample one action.

        Raises:
            EngineDead: there is no engine left to sample with.
        """
        from vllm import SamplingParams

        # Suppressed tokens are masked by the worker, for all requests alike.
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )
        output, spans = await self._generate(prompt, params, name)
        completion = output.outputs[0]
        if self._engine_counts and (labelled := completion.weight_versions) is not None:
            spans = tuple(Span(Version.from_label(span.version), span.start, span.end) for span in labelled)
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return Sampled(
            prompt_ids=output.prompt_token_ids,
            action_ids=list(completion.token_ids),
            logprobs=[at[token].logprob for token, at in pairs],
            spans=spans,
            stopped=completion.finish_reason == "stop",
            num_cached_tokens=output.num_cached_tokens or 0,
            **_timings_ms(output.metrics),
        )

    async def score(self, prompt: Prompt, continuation_ids: Sequence[int], name: str) -> list[float]:
        """Logprobs of a given continuation at temperature 1, with nothing suppressed."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        whole = Prompt([*prompt.ids, *continuation_ids], prompt.images)
        scored, _ = await self._generate(whole, params, name)
        tail = scored.prompt_logprobs[-len(continuation_ids) :]
        return [at[token].logprob for token, at in zip(continuation_ids, tail, strict=True)]

    async def _generate(self, prompt: Prompt, params: Any, name: str) -> tuple[RequestOutput, tuple[Span, ...]]:
        """The finished output of one request, and which of its tokens were sampled under which version.

        Raises:
            EngineDead: there is no engine left to sample with.
            RuntimeError: vLLM fails on this request.
        """
        # vLLM believes that a screenshot is beside the model once a request with it was on its way there. One that was
        # given up on that way leaves it wrong, and the next request fails: it goes once more, with everything.
        for resend in (False, True):
            inputs = engine_input(self.llm.input_processor, prompt, self._image_token_id, resend=resend)
            output, spans = await self._generate_once(inputs, params, name)
            if output.outputs[0].finish_reason != "error":
                return output, spans
        raise RuntimeError(f"vLLM failed on request {name}")

    async def _generate_once(
        self, inputs: MultiModalInput | TokensInput, params: Any, name: str
    ) -> tuple[RequestOutput, tuple[Span, ...]]:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params.output_kind = RequestOutputKind.FINAL_ONLY
        own_name = f"{name}#{next(self._numbers)}"
        counter = self._counters[own_name] = SpanCounter()
        try:
            async for output in self.llm.generate(inputs, params, own_name):
                finished = output
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process died") from error
        finally:
            del self._counters[own_name]
        counter.count_to(self.version, len(finished.outputs[0].token_ids))
        return finished, counter.spans()

    async def pause(self) -> int:
        """Stop sampling, keeping the requests; how many were kept."""
        # Caches are cleared by `clear_caches`, which knows what the new weights leave valid.
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        return self.num_running

    async def load(self, path: str) -> None:
        """Load all weights from a safetensors file while paused."""
        await self._update_weights({"path": path})

    async def gpu_uuids(self) -> list[str]:
        """The GPU of each worker; none where there are none."""
        return [uuid for uuid in await self.llm.collective_rpc("deskrl_gpu_uuid") if uuid]

    async def join(self, communicator_id: bytes) -> None:
        """Begin to join a communicator with the learner, while sampling goes on."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info={"communicator_id": communicator_id.hex()})
        await self.llm.init_weight_transfer_engine(request)

    async def receive(self, source: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> Received:
        """Load all weights directly from the learner's GPU while paused.

        Args:
            source: which of the transfer engine's links, as its `Update` has it.
            tensors: of the model's checkpoint, in the order in which they come.
        """
        await self._update_weights(
            {
                **source,
                "names": [tensor.name for tensor in tensors],
                "dtypes": [tensor.dtype for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
        )
        return merge_received(await self.llm.collective_rpc("deskrl_received"))

    async def _update_weights(self, update: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.start_weight_update()
        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        await self.llm.finish_weight_update()

    async def clear_caches(self, *, vision_changed: bool) -> None:
        """Forget what the old weights computed while paused; kept requests are computed anew from their tokens."""
        await self.llm.reset_prefix_cache(reset_running_requests=True)
        if vision_changed:
            await self.llm.reset_encoder_cache()

    async def resume(self) -> None:
        """Go on sampling."""
        await self.llm.resume_generation()

    async def set_version(self, version: Version) -> None:
        """Say which weights are in place; of weights that were loaded, while paused."""
        if self._engine_counts:
            await self.llm.update_weight_version(str(version))
        # Nothing is sampled while the label changes: what there is of each action was sampled under the old version.
        for state in self.llm.output_processor.request_states.values():
            if (counter := self._counters.get(state.external_req_id)) is not None:
                counter.count_to(self.version, state.detokenizer.num_output_tokens())
        self.version = version

    def shutdown(self) -> None:
        """End vLLM's processes and wait until they are gone."""
        self.llm.shutdown()
        # Its finalizer shuts down once more, which at the interpreter's end is too late to work.
        del self.llm


def _timings_ms(metrics: Any) -> dict[str, float]:
    """Time in queue, to the first token and from there to the last; all zero where vLLM keeps no such figures."""
    if metrics is None or not metrics.first_token_ts:
        return {"queue_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 0.0}
    return {
        "queue_ms": (metrics.scheduled_ts - metrics.queued_ts) * 1e3,
        "prefill_ms": (metrics.first_token_ts - metrics.scheduled_ts) * 1e3,
        "decode_ms": (metrics.last_token_ts - metrics.first_token_ts) * 1e3,
    }
