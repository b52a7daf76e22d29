"""What deskrl adds to the model inside vLLM's worker: the floats of screenshots, and the mask over suppressed tokens.

Both belong beside the model. Screenshots come as bytes (see `pixels`) and become floats by table on the device. The
tokens that are never sampled are the same for every request, and may be most of the vocabulary: one addition masks
them, where a bias sent with each request would be megabytes. Knows vLLM's worker; knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.inference.engine_input import PATCHES_KEY
from deskrl.inference.masking import MaskedSampler
from deskrl.inference.pixels import patch_floats
from deskrl.inference.transfer import TransferExtension


class WorkerExtension(TransferExtension):
    """Mixed into vLLM's workers; the engine calls `deskrl_set_up_policy` once, before the first request."""

    model_runner: Any
    vllm_config: Any

    def deskrl_set_up_policy(
        self, suppressed_ids: Sequence[int], levels: Sequence[Sequence[float]], num_frames: int
    ) -> None:
        """Make the model take screenshots as bytes, and the sampler leave suppressed tokens out.

        Args:
            suppressed_ids: never sampled; what prompts are scored at is not touched.
            levels: for each channel of a screenshot, what each of its 256 levels becomes.
            num_frames: how often a patch is repeated.
        """
        import torch

        if self.vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding would pass the mask over suppressed tokens by")
        runner = self.model_runner
        model = runner.get_model()
        parameter = next(model.visual.parameters())
        # What the tower would do with the processor's floats: round them to its own type.
        table = torch.tensor(levels, dtype=torch.float32).to(parameter)
        embed = model.embed_multimodal

        def embed_bytes(**inputs: Any) -> Any:
            if (levels_ND := inputs.pop(PATCHES_KEY, None)) is not None:
                inputs["pixel_values"] = patch_floats(levels_ND, table, num_frames)
            return embed(**inputs)

        model.embed_multimodal = embed_bytes
        runner.sampler = MaskedSampler(runner.sampler, suppressed_ids, runner.model_config.get_vocab_size())
