"""Light engine for tests: replaces vLLM in the inference role by transformers on CPU, and starts in seconds.

`python light_engine.py CONFIG` is `deskrl inference CONFIG` with this engine: services, screenshots, weight updates and
canary are the real ones. So are weights and logprobs, which transformers computes with the tiny model. Only the actions
are synthetic: well-formed ones that the seed of the request selects. Direct weight transfers are not supported.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from deskrl.core.config import RunConfig
from deskrl.inference.engine_prompt import EnginePrompt
from deskrl.inference.served_version import INITIAL_VERSION, ServedVersion, VersionedSpan
from deskrl.inference.vllm_engine import ModelSpec, SampledOutput, VllmEngine

if TYPE_CHECKING:
    from torch import Tensor

WORDS = ("amber", "birch", "cedar")
_FINISH_SHARE = 0.4


class LightEngine(VllmEngine):
    """One model in this process; forward passes and changes of weights exclude each other.

    Args:
        config: run configuration.
        model_spec: properties of the model.
    """

    def __init__(self, config: RunConfig, model_spec: ModelSpec) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        folder = config.model_folder
        self.version = INITIAL_VERSION
        self._model_spec = model_spec
        self._table = torch.tensor(model_spec.normalisation_table.values)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._lock = asyncio.Lock()
        self._num_running = 0

    @classmethod
    async def start(cls, config: RunConfig, model_spec: ModelSpec) -> LightEngine:
        """Load the model."""
        return cls(config, model_spec)

    @property
    def name(self) -> str:
        """Name of the engine, for `GetModelInfo`."""
        return "light test engine"

    @property
    def num_running(self) -> int:
        """Number of unfinished requests."""
        return self._num_running

    async def sample(
        self, prompt: EnginePrompt, *, temperature: float, max_tokens: int, seed: int, name: str
    ) -> SampledOutput:
        """Return an action that the seed selects, with its logprobs under the policy."""
        from deskrl.core.prompt_rendering import end_of_turn_id

        random = Random(seed)
        action = "finished()" if random.random() < _FINISH_SHARE else f"type(content='{random.choice(WORDS)}')"
        text_ids = self._tokenizer(f"Thought: Go on.\nAction: {action}", add_special_tokens=False)["input_ids"]
        action_ids = [*text_ids, end_of_turn_id(self._tokenizer)][:max_tokens]
        self._num_running += 1
        try:
            async with self._lock:
                version = self.version
                prompt_ids, logits_AV = await asyncio.to_thread(self._logits, prompt, action_ids)
        finally:
            self._num_running -= 1
        logits_AV[:, list(self._model_spec.suppressed_ids)] = float("-inf")
        return SampledOutput(
            prompt_ids=prompt_ids,
            action_ids=action_ids,
            logprobs=_logprobs(logits_AV / temperature, action_ids),
            spans=(VersionedSpan(version, 0, len(action_ids)),),
            stopped=True,
            num_cached_tokens=0,
            queue_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    async def score(self, prompt: EnginePrompt, continuation_ids: Sequence[int], name: str) -> list[float]:
        """Implement `VllmEngine`."""
        async with self._lock:
            _, logits_AV = await asyncio.to_thread(self._logits, prompt, continuation_ids)
        return _logprobs(logits_AV, continuation_ids)

    async def pause(self) -> int:
        """Acquire the lock; running requests wait for it."""
        num_kept = self._num_running
        await self._lock.acquire()
        return num_kept

    async def load(self, path: str) -> None:
        """Implement `VllmEngine`."""
        await asyncio.to_thread(self._load, path)

    async def gpu_uuids(self) -> list[str]:
        """Return no GPUs."""
        return []

    async def clear_caches(self, *, vision_changed: bool) -> None:
        """Do nothing: there are no caches."""

    async def resume(self) -> None:
        """Release the lock."""
        self._lock.release()

    async def set_version(self, version: ServedVersion) -> None:
        """Implement `VllmEngine`."""
        self.version = version

    def shutdown(self) -> None:
        """Do nothing: there are no other processes."""

    def _load(self, path: str) -> None:
        from inference_kit import transformers_name
        from safetensors.torch import load_file

        tensors = {transformers_name(name): tensor for name, tensor in load_file(path).items()}
        unexpected = self._model.load_state_dict(tensors, strict=False)[1]
        if unexpected:
            raise ValueError(f"unknown weights: {unexpected[:3]}")

    def _logits(self, prompt: EnginePrompt, action_ids: Sequence[int]) -> tuple[list[int], Tensor]:
        """Return the expanded prompt, and the logits (A, vocabulary) of each action token."""
        import torch

        from deskrl.core.prompt_rendering import expand_images_with_starts
        from deskrl.inference.image_preprocessing import normalise_patches

        counts = [patches.num_tokens for _, patches in prompt.images]
        prompt_ids = list(expand_images_with_starts(prompt.ids, self._model_spec.image_token_id, counts)[0])
        ids_1T = torch.tensor([[*prompt_ids, *action_ids]])
        pixels: dict[str, Any] = {}
        if prompt.images:
            levels_ND = torch.cat([patches.levels_ND for _, patches in prompt.images])
            pixels["pixel_values"] = normalise_patches(
                levels_ND, self._table, self._model_spec.normalisation_table.num_frames
            )
            pixels["image_grid_thw"] = torch.stack([patches.grid_thw_3 for _, patches in prompt.images])
        with torch.no_grad():
            is_image_1T = (ids_1T == self._model_spec.image_token_id).int()
            logits_TV = self._model(input_ids=ids_1T, mm_token_type_ids=is_image_1T, use_cache=False, **pixels).logits[
                0
            ]
        return prompt_ids, logits_TV[len(prompt_ids) - 1 : -1].float()


def _logprobs(logits_AV: Tensor, action_ids: Sequence[int]) -> list[float]:
    logprobs_AV = logits_AV.log_softmax(-1)
    return [float(logprobs_AV[index, token]) for index, token in enumerate(action_ids)]


if __name__ == "__main__":
    from deskrl.cli.main import main

    VllmEngine.start = LightEngine.start  # type: ignore[method-assign, assignment]
    sys.exit(main(["inference", *sys.argv[1:]]))
