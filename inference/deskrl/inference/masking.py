"""Suppressed tokens: the same for every request, and so masked where all requests meet, before the sampler.

They may be most of the vocabulary (rows that the tokenizer gives no meaning), and a bias that each request brings
would be megabytes of it. Knows logits; knows no tokens' meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class MaskedSampler:
    """vLLM's sampler, given logits that are -inf at the suppressed tokens."""

    def __init__(self, sampler: Any, suppressed_ids: Sequence[int], vocab_size: int) -> None:
        import torch

        self._sampler = sampler
        self._mask_V = torch.zeros(vocab_size).index_fill_(
            0, torch.tensor(suppressed_ids, dtype=torch.long), -torch.inf
        )

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._mask_V.device != logits.device:
            self._mask_V = self._mask_V.to(logits.device)
        # An addition rather than an indexed write: one pass over memory, however many tokens there are.
        return self._sampler(logits.add_(self._mask_V), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
