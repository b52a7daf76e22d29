"""An engine for tests that is not vLLM, behind all else of the inference role: up in seconds instead of a minute.

`python light_engine.py CONFIG` is `deskrl inference CONFIG` with it: the same services, screenshots, weight updates and
canary. Weights are real, and so is every logprob: transformers' forward pass over the tiny model. Only what is said is
made up: well-formed actions, drawn by the request's seed. Knows no GPU; takes weights as a stream alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from deskrl.core.config import RunConfig
from deskrl.inference.engine import Engine, ModelFacts, Sampled
from deskrl.inference.engine_input import Prompt
from deskrl.inference.versions import INITIAL, Span, Version

if TYPE_CHECKING:
    from torch import Tensor

WORDS = ("amber", "birch", "cedar")
_FINISH_SHARE = 0.4


class LightEngine(Engine):
    """One model in this process. A forward pass and a change of weights take turns.

    Args:
        config: of the run.
        facts: what prompts are made by.
    """

    def __init__(self, config: RunConfig, facts: ModelFacts) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        folder = config.model_folder
        self.version = INITIAL
        self._facts = facts
        self._table = torch.tensor(facts.float_table.values)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._turn = asyncio.Lock()
        self._num_running = 0

    @classmethod
    async def start(cls, config: RunConfig, facts: ModelFacts) -> LightEngine:
        """Load the model."""
        return cls(config, facts)

    @property
    def name(self) -> str:
        """For `GetModelInfo`."""
        return "light engine of the tests"

    @property
    def num_running(self) -> int:
        """Requests that were begun and have not ended."""
        return self._num_running

    async def sample(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int, name: str) -> Sampled:
        """An action that the seed draws, with its logprobs under the policy as it is asked for."""
        from deskrl.core.rendering import end_of_turn_id

        random = Random(seed)
        action = "finished()" if random.random() < _FINISH_SHARE else f"type(content='{random.choice(WORDS)}')"
        said = self._tokenizer(f"Thought: Go on.\nAction: {action}", add_special_tokens=False)["input_ids"]
        action_ids = [*said, end_of_turn_id(self._tokenizer)][:max_tokens]
        self._num_running += 1
        try:
            async with self._turn:
                version = self.version
                prompt_ids, logits_AV = await asyncio.to_thread(self._logits, prompt, action_ids)
        finally:
            self._num_running -= 1
        logits_AV[:, list(self._facts.suppressed_ids)] = float("-inf")
        return Sampled(
            prompt_ids=prompt_ids,
            action_ids=action_ids,
            logprobs=_logprobs(logits_AV / temperature, action_ids),
            spans=(Span(version, 0, len(action_ids)),),
            stopped=True,
            num_cached_tokens=0,
            queue_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    async def score(self, prompt: Prompt, continuation_ids: Sequence[int], name: str) -> list[float]:
        """See `Engine`."""
        async with self._turn:
            _, logits_AV = await asyncio.to_thread(self._logits, prompt, continuation_ids)
        return _logprobs(logits_AV, continuation_ids)

    async def pause(self) -> int:
        """Take the turn: what was begun waits for it."""
        num_kept = self._num_running
        await self._turn.acquire()
        return num_kept

    async def load(self, path: str) -> None:
        """See `Engine`."""
        await asyncio.to_thread(self._load, path)

    async def gpu_uuids(self) -> list[str]:
        """None."""
        return []

    async def clear_caches(self, *, vision_changed: bool) -> None:
        """There are none."""

    async def resume(self) -> None:
        """Give the turn back."""
        self._turn.release()

    async def set_version(self, version: Version) -> None:
        """See `Engine`."""
        self.version = version

    def shutdown(self) -> None:
        """Nothing to end."""

    def _load(self, path: str) -> None:
        from inference_kit import in_memory
        from safetensors.torch import load_file

        tensors = {in_memory(name): tensor for name, tensor in load_file(path).items()}
        unexpected = self._model.load_state_dict(tensors, strict=False)[1]
        if unexpected:
            raise ValueError(f"weights that the model lacks: {unexpected[:3]}")

    def _logits(self, prompt: Prompt, action_ids: Sequence[int]) -> tuple[list[int], Tensor]:
        """The expanded prompt, and the logits (A, vocabulary) that each action token was drawn from."""
        import torch

        from deskrl.core.rendering import place_images
        from deskrl.inference.pixels import patch_floats

        counts = [patches.num_tokens for _, patches in prompt.images]
        prompt_ids = list(place_images(prompt.ids, self._facts.image_token_id, counts)[0])
        ids_1T = torch.tensor([[*prompt_ids, *action_ids]])
        pixels: dict[str, Any] = {}
        if prompt.images:
            levels_ND = torch.cat([patches.levels_ND for _, patches in prompt.images])
            pixels["pixel_values"] = patch_floats(levels_ND, self._table, self._facts.float_table.num_frames)
            pixels["image_grid_thw"] = torch.stack([patches.grid_thw_3 for _, patches in prompt.images])
        with torch.no_grad():
            is_image_1T = (ids_1T == self._facts.image_token_id).int()
            logits_TV = self._model(input_ids=ids_1T, mm_token_type_ids=is_image_1T, use_cache=False, **pixels).logits[
                0
            ]
        return prompt_ids, logits_TV[len(prompt_ids) - 1 : -1].float()


def _logprobs(logits_AV: Tensor, action_ids: Sequence[int]) -> list[float]:
    logprobs_AV = logits_AV.log_softmax(-1)
    return [float(logprobs_AV[index, token]) for index, token in enumerate(action_ids)]


if __name__ == "__main__":
    from deskrl.core.cli import main

    Engine.start = LightEngine.start  # type: ignore[method-assign, assignment]
    sys.exit(main(["inference", *sys.argv[1:]]))
