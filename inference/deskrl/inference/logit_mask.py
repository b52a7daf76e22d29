"""Suppression of tokens: masks the logits of suppressed tokens before vLLM's sampler.

The suppressed tokens are the same for all requests and may be most of the vocabulary (rows without a token). The mask
is therefore applied once to the whole batch; a logit bias per request would cost megabytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class MaskedSampler:
    """Wraps vLLM's sampler and sets the logits of suppressed tokens to -inf."""

    def __init__(self, sampler: Any, suppressed_ids: Sequence[int], vocab_size: int) -> None:
        import torch

        self._sampler = sampler
        self._mask_V = torch.zeros(vocab_size).index_fill_(
            0, torch.tensor(suppressed_ids, dtype=torch.long), -torch.inf
        )

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mask the logits and call the wrapped sampler."""
        if self._mask_V.device != logits.device:
            self._mask_V = self._mask_V.to(logits.device)
        # Addition instead of an indexed write: one pass over memory for any number of suppressed tokens.
        return self._sampler(logits.add_(self._mask_V), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
