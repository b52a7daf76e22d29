"""The sampled tokens of a step as a person looks at them: text, logprob, version, and how sure the policy was.

Knows token ids and, where the model's tokenizer can be read, their text; knows no page.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.trajectory import Step


@dataclass(frozen=True)
class TokenView:
    """One sampled token."""

    text: str
    token_id: int
    logprob: float
    version: int | None

    @property
    def probability(self) -> float:
        """With which it was sampled."""
        return math.exp(min(self.logprob, 0.0))


def token_texts(model_folder: Path) -> Callable[[int], str] | None:
    """What each token id stands for; None without the package `tokenizers` or without the model's tokenizer.json."""
    path = model_folder / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None or not path.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def text(token_id: int) -> str:
        decoded: str = tokenizer.decode([token_id], skip_special_tokens=False)
        return decoded

    return text


def token_views(step: Step, text_of: Callable[[int], str] | None) -> list[TokenView]:
    """The step's tokens in order; none for a scripted step, which nobody sampled."""
    versions: list[int | None] = [None] * len(step.action_ids)
    for span in step.spans:
        versions[span.start : span.end] = [span.step] * (span.end - span.start)
    return [
        TokenView(text_of(token_id) if text_of else str(token_id), token_id, logprob, version)
        for token_id, logprob, version in zip(step.action_ids, step.logprobs, versions, strict=True)
    ]
