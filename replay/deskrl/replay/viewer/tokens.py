"""The sampled tokens of a step as a person looks at them: text, logprob, version, and what the learner made of each.

Knows token ids and, where the model's tokenizer can be read, their text; knows no page.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.scores import EpisodeScores
from deskrl.core.trajectory import Step


@dataclass(frozen=True)
class TokenView:
    """One sampled token."""

    text: str
    token_id: int
    logprob: float
    version: int | None
    learner_logprob: float | None
    """Under the policy that its batch started from; None where the learner's scores are not kept."""
    entropy: float | None
    """Of the distribution that it was sampled from, in nats, as the learner has it."""

    @property
    def probability(self) -> float:
        """With which it was sampled."""
        return math.exp(min(self.logprob, 0.0))

    @property
    def difference(self) -> float | None:
        """The learner's logprob less the sampled one: rounding at the same version, learning since an older one."""
        return None if self.learner_logprob is None else self.learner_logprob - self.logprob


def token_texts(model_folder: Path) -> Callable[[int], str] | None:
    """What each token id stands for; None without the package `tokenizers` or without the model's tokenizer.json.

    Raises:
        UserError: that file is damaged.
    """
    path = model_folder / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None or not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        mend = "restore it from a copy, or move it away: tokens are then shown by their numbers"
        raise UserError(f"{path} cannot be read: {error}", mend) from error

    def text(token_id: int) -> str:
        decoded: str = tokenizer.decode([token_id], skip_special_tokens=False)
        return decoded

    return text


def token_views(
    step: Step, text_of: Callable[[int], str] | None, scores: Sequence[tuple[float, float]] | None
) -> list[TokenView]:
    """The step's tokens in order; none for a scripted step, which nobody sampled.

    Args:
        step: as stored.
        text_of: what a token id stands for.
        scores: the learner's logprob and the entropy of each token.
    """
    versions: list[int | None] = [None] * len(step.action_ids)
    for span in step.spans:
        versions[span.start : span.end] = [span.step] * (span.end - span.start)
    learnt: Sequence[tuple[float | None, float | None]] = scores or [(None, None)] * len(step.action_ids)
    return [
        TokenView(text_of(token_id) if text_of else str(token_id), token_id, logprob, version, *of_learner)
        for token_id, logprob, version, of_learner in zip(step.action_ids, step.logprobs, versions, learnt, strict=True)
    ]


def scores_of_step(steps: Sequence[Step], index: int, scores: EpisodeScores) -> list[tuple[float, float]] | None:
    """The learner's logprob and the entropy of each token of one step; None if the scores are of other tokens."""
    if len(scores.logprobs) != sum(len(step.action_ids) for step in steps):
        return None
    start = sum(len(step.action_ids) for step in steps[:index])
    end = start + len(steps[index].action_ids)
    return list(zip(scores.logprobs[start:end], scores.entropies[start:end], strict=True))
