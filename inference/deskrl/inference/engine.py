"""The engine: vLLM's AsyncLLM behind the few calls that deskrl makes of it.

Knows vLLM, token ids, images, labels and files; knows no conversation, no gRPC and no learner.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deskrl.core import lifetime
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.inference.versions import INITIAL, Span, SpanCounter, Version
from deskrl.inference.weights import Received, merge_received

if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from deskrl.proto.v1.weights_pb2 import TensorSpec

TRANSFER_BACKEND = "deskrl"
"""Name of the weight-transfer engine that `transfer` registers with vLLM."""


class EngineDead(Exception):
    """The engine's processes are gone; this replica cannot serve any more."""


@dataclass(frozen=True)
class Prompt:
    """Token ids with one image token per screenshot, and the screenshots by hash in the same order."""

    ids: Sequence[int]
    images: Sequence[tuple[str, Image]]


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

    def __init__(self, llm: AsyncLLM, suppressed_ids: Sequence[int], *, trust_engine_versions: bool = True) -> None:
        """Wrap an engine that runs.

        Args:
            llm: the engine.
            suppressed_ids: never sampled.
            trust_engine_versions: take token versions from vLLM where it counts them (0.32 and later), not from us.
        """
        from vllm.outputs import CompletionOutput

        self.llm = llm
        self.version = INITIAL
        # Infinite, where an OpenAI client would say -100: the learner masks the same logits with the same value.
        self._logit_bias = dict.fromkeys(suppressed_ids, float("-inf"))
        self._engine_counts = trust_engine_versions and "weight_versions" in CompletionOutput.__dataclass_fields__
        self._numbers = itertools.count()
        self._num_running = 0

    @classmethod
    async def start(cls, config: RunConfig, suppressed_ids: Sequence[int]) -> Engine:
        """Start vLLM's processes, and wait until they can sample.

        Raises:
            UserError: vLLM refuses the model or the settings.
        """
        _set_environment(_ENVIRONMENT)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        if current_platform.is_cpu():
            _set_environment(_CPU_ENVIRONMENT)
        # Who the processes below follow is this role, which follows its own supervisor.
        os.environ |= lifetime.supervised_environment()
        try:
            engine_config = AsyncEngineArgs(**engine_arguments(config)).create_engine_config()
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM refuses these settings: {reason}", "mend the inference section") from error
        engine = cls(AsyncLLM.from_vllm_config(engine_config), suppressed_ids)
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
        return self._num_running

    async def sample(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int, name: str) -> Sampled:
        """Sample one action.

        Raises:
            EngineDead: there is no engine left to sample with.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token only
            logit_bias=self._logit_bias,
            detokenize=False,
            # Versions are counted by watching tokens come; an engine that counts them itself need not stream.
            output_kind=RequestOutputKind.FINAL_ONLY if self._engine_counts else RequestOutputKind.DELTA,
        )
        counter = SpanCounter()
        action_ids: list[int] = []
        logprobs: list[float] = []
        async for output in self._generate(prompt, params, name):
            completion = output.outputs[0]
            counter.add(self.version, len(completion.token_ids))
            action_ids += completion.token_ids
            logprobs += [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]
        labelled = completion.weight_versions if self._engine_counts else None
        spans = (
            counter.spans()
            if labelled is None
            else tuple(Span(Version.from_label(span.version), span.start, span.end) for span in labelled)
        )
        stopped = completion.finish_reason == "stop"
        num_cached = output.num_cached_tokens or 0
        timings_ms = _timings_ms(output.metrics)
        return Sampled(output.prompt_token_ids, action_ids, logprobs, spans, stopped, num_cached, *timings_ms)

    async def score(self, prompt: Prompt, continuation_ids: Sequence[int], name: str) -> list[float]:
        """Logprobs of a given continuation at temperature 1, with nothing suppressed."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        whole = Prompt([*prompt.ids, *continuation_ids], prompt.images)
        async for output in self._generate(whole, params, name):
            scored = output
        tail = scored.prompt_logprobs[-len(continuation_ids) :]
        return [at[token].logprob for token, at in zip(continuation_ids, tail, strict=True)]

    async def _generate(self, prompt: Prompt, params: object, name: str) -> AsyncIterator[RequestOutput]:
        from vllm.v1.engine.exceptions import EngineDeadError

        inputs: dict[str, Any] = {"prompt_token_ids": list(prompt.ids)}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": [image for _, image in prompt.images]}
            # Caches of processed pixels and of encoder outputs go by these names, so a screenshot is processed once.
            inputs["multi_modal_uuids"] = {"image": [name for name, _ in prompt.images]}
        self._num_running += 1
        try:
            async for output in self.llm.generate(inputs, params, f"{name}#{next(self._numbers)}"):
                yield output
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process died") from error
        finally:
            self._num_running -= 1

    async def pause(self) -> int:
        """Stop sampling, keeping the requests; how many were kept."""
        # Caches are cleared by `clear_caches`, which knows what the new weights leave valid.
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        return self._num_running

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
        self.version = version

    def shutdown(self) -> None:
        """End vLLM's processes and wait until they are gone."""
        self.llm.shutdown()
        # Its finalizer shuts down once more, which at the interpreter's end is too late to work.
        del self.llm


def engine_arguments(config: RunConfig) -> dict[str, Any]:
    """vLLM's engine arguments for a run; what `inference.engine_args` says wins."""
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    inference = config.inference
    arguments: dict[str, Any] = {
        "model": str(config.model_folder),
        "dtype": inference.dtype,
        "seed": config.seed,
        "max_model_len": inference.max_model_len,
        "max_num_seqs": inference.max_concurrent,
        "gpu_memory_utilization": inference.gpu_memory_fraction,
        "kv_cache_memory_bytes": inference.kv_cache_bytes,
        "limit_mm_per_prompt": {"image": inference.max_images, "video": 0},
        "mm_processor_cache_gb": inference.image_cache_bytes / 1024**3,
        # Under the distribution that is sampled from: suppressed tokens and temperature applied.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER_BACKEND),
        "worker_extension_cls": "deskrl.inference.transfer.TransferExtension",
    }
    if current_platform.is_cpu():
        # One process beside this one, as on a single GPU: a worker of its own would start 8 s later, cost half a
        # gigabyte, and spin on a core while it waits.
        arguments |= {"distributed_executor_backend": "uni", "enforce_eager": True}
    return arguments | inference.engine_args


_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

_CPU_ENVIRONMENT = {
    # Else vLLM's CPU platform insists on a worker process, for the sake of thread binding.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The cores are shared with desktops and a learner: threads go where there is room, and leave room.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compiling the sampler's few small functions delays the first request by 2 to 15 s and gains nothing.
    "TORCHDYNAMO_DISABLE": "1",
}


def _set_environment(defaults: Mapping[str, str]) -> None:
    """Set what vLLM reads from the environment; the user's own settings win."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _timings_ms(metrics: Any) -> tuple[float, float, float]:
    """Time in queue, to the first token and from there to the last; all zero where vLLM keeps no such figures."""
    if metrics is None or not metrics.first_token_ts:
        return 0.0, 0.0, 0.0
    queue_s = metrics.scheduled_ts - metrics.queued_ts
    prefill_s = metrics.first_token_ts - metrics.scheduled_ts
    return queue_s * 1e3, prefill_s * 1e3, (metrics.last_token_ts - metrics.first_token_ts) * 1e3
