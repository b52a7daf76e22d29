"""Suppressed tokens for a bare vLLM, as deskrl suppresses them: of the same engine, only the mask is added.

Imported by vLLM's engine process, which is told of it by `worker_extension_cls="masking_extension.MaskingExtension"`. A
logits processor would do it too, but makes vLLM 0.26 fall back to its older model runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.inference.masking import MaskedSampler


class MaskingExtension:
    """Mixed into vLLM's workers."""

    model_runner: Any

    def mask_tokens(self, suppressed_ids: Sequence[int]) -> None:
        """Never sample these."""
        runner = self.model_runner
        runner.sampler = MaskedSampler(runner.sampler, suppressed_ids, runner.model_config.get_vocab_size())
