"""Sampled tokens of a step for display: text, logprob, policy version, and the learner's logprob and entropy."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step
from deskrl.learner.batches.token_stats import EpisodeTokenStats


@dataclass(frozen=True)
class TokenView:
    """One sampled token."""

    text: str
    token_id: int
    logprob: float
    version: int | None
    learner_logprob: float | None
    """Logprob under the proximal policy; None if the learner's token statistics are not stored."""
    entropy: float | None
    """Entropy of the distribution at this position under the proximal policy, in nats."""

    @property
    def probability(self) -> float:
        """Probability under the behaviour policy."""
        return math.exp(min(self.logprob, 0.0))

    @property
    def difference(self) -> float | None:
        """Learner's logprob minus the sampled one: rounding error at the same policy version, else also training."""
        return None if self.learner_logprob is None else self.learner_logprob - self.logprob


def load_token_decoder(model_folder: Path) -> Callable[[int], str] | None:
    """Return a function that decodes one token id.

    None if the package `tokenizers` is not installed or the model has no tokenizer.json.

    Raises:
        UserError: tokenizer.json is damaged.
    """
    path = model_folder / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None or not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        hint = "restore it from a copy, or remove it to show token ids instead of text"
        raise UserError(f"{path}: cannot be read: {error}", hint) from error

    def decode(token_id: int) -> str:
        decoded: str = tokenizer.decode([token_id], skip_special_tokens=False)
        return decoded

    return decode


def token_views(
    step: Step, decode: Callable[[int], str] | None, stats: Sequence[tuple[float, float]] | None
) -> list[TokenView]:
    """Return the sampled tokens of a step in order; empty for a scripted step.

    Args:
        step: stored step.
        decode: function that decodes a token id; None: show ids.
        stats: learner's logprob and entropy of each token; None: not stored.
    """
    versions: list[int | None] = [None] * len(step.action_ids)
    for span in step.spans:
        versions[span.start : span.end] = [span.step] * (span.end - span.start)
    learner: Sequence[tuple[float | None, float | None]] = stats or [(None, None)] * len(step.action_ids)
    return [
        TokenView(decode(token_id) if decode else str(token_id), token_id, logprob, version, *learner_values)
        for token_id, logprob, version, learner_values in zip(
            step.action_ids, step.logprobs, versions, learner, strict=True
        )
    ]


def stats_of_step(steps: Sequence[Step], index: int, stats: EpisodeTokenStats) -> list[tuple[float, float]] | None:
    """Return learner's logprob and entropy of each token of one step; None if the number of tokens does not match."""
    if len(stats.logprobs) != sum(len(step.action_ids) for step in steps):
        return None
    start = sum(len(step.action_ids) for step in steps[:index])
    end = start + len(steps[index].action_ids)
    return list(zip(stats.logprobs[start:end], stats.entropies[start:end], strict=True))
