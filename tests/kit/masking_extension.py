"""Worker extension that adds deskrl's suppression of tokens, and nothing else, to a bare vLLM.

A logits processor is not an alternative, because vLLM 0.26 falls back to its older model runner with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.inference.logit_mask import MaskedSampler


class MaskingExtension:
    """Mixin of vLLM's workers."""

    model_runner: Any

    def mask_tokens(self, suppressed_ids: Sequence[int]) -> None:
        """Suppress these token ids from now on."""
        runner = self.model_runner
        runner.sampler = MaskedSampler(runner.sampler, suppressed_ids, runner.model_config.get_vocab_size())
