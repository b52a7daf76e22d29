"""Worker extension of vLLM: converts screenshots to floats on the device and suppresses tokens.

Screenshots arrive as bytes and are normalised by a lookup table (see `image_preprocessing`). Suppressed tokens are
masked for the whole batch (see `logit_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.inference.engine_prompt import PATCHES_KEY
from deskrl.inference.image_preprocessing import normalise_patches
from deskrl.inference.logit_mask import MaskedSampler
from deskrl.inference.vllm_weight_engine import WeightTransferExtension


class WorkerExtension(WeightTransferExtension):
    """Mixin of vLLM's workers; the engine calls `deskrl_set_up_policy` once, before the first request."""

    model_runner: Any
    vllm_config: Any

    def deskrl_set_up_policy(
        self, suppressed_ids: Sequence[int], levels: Sequence[Sequence[float]], num_frames: int
    ) -> None:
        """Make the model accept screenshots as bytes, and the sampler suppress tokens.

        Args:
            suppressed_ids: token ids that are never sampled; scores of given continuations are unaffected.
            levels: normalised float of each of the 256 levels, per channel.
            num_frames: number of repetitions of each patch.

        Raises:
            ValueError: speculative decoding is enabled.
        """
        import torch

        if self.vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding is not supported: it bypasses the suppression of tokens")
        runner = self.model_runner
        model = runner.get_model()
        parameter = next(model.visual.parameters())
        # The tower would round the floats of the processor to its own dtype in the same way.
        table = torch.tensor(levels, dtype=torch.float32).to(parameter)
        embed = model.embed_multimodal

        def embed_bytes(**inputs: Any) -> Any:
            if (levels_ND := inputs.pop(PATCHES_KEY, None)) is not None:
                inputs["pixel_values"] = normalise_patches(levels_ND, table, num_frames)
            return embed(**inputs)

        model.embed_multimodal = embed_bytes
        runner.sampler = MaskedSampler(runner.sampler, suppressed_ids, runner.model_config.get_vocab_size())
