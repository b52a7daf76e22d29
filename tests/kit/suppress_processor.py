"""Suppressed tokens for a bare vLLM, by its documented interface: a logits processor that is the same for all requests.

Imported by vLLM's engine process, which is told of it by `logits_processors=["suppress_processor:SuppressTokens"]`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

CONFIG_KEY = "suppressed_ids"
"""Where `additional_config` holds the tokens."""


class SuppressTokens(LogitsProcessor):  # type: ignore[misc]
    """Adds minus infinity to the logits of tokens that are never sampled."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        suppressed = torch.tensor(vllm_config.additional_config[CONFIG_KEY], dtype=torch.long)
        mask_V = torch.zeros(vllm_config.model_config.get_vocab_size()).index_fill_(0, suppressed, -torch.inf)
        self._mask_V = mask_V.to(device)

    def is_argmax_invariant(self) -> bool:
        """A suppressed token may have been the likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the requests."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask."""
        return logits.add_(self._mask_V)
