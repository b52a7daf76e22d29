"""Section `reward`: the terms whose weighted mean is the reward of an episode."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from deskrl.core.config.value_types import NonNegativeFactor, PositiveSeconds, Section

TermName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class RewardTermConfig(Section):
    """One term of the reward."""

    kind: Annotated[str, Field(min_length=1)] = "evaluators"
    """Reward that gives the term its value. `evaluators`: the task's own evaluator; `vision_language_judge`: a
    vision-language model that looks at screenshots; or your own, as `package.module:object` or by the name of an
    installed package's entry point."""
    weight: NonNegativeFactor = 1.0
    """Weight of the term in the mean. 0: the term is logged, and later terms can use it, but it does not count."""
    timeout_s: PositiveSeconds | None = None
    """Timeout of the term; unset: `desktop.evaluate_timeout_s`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the kind."""


class RewardConfig(Section):
    """Reward of an episode: mean of its terms, weighted by their weights, which need not sum to 1."""

    terms: dict[TermName, RewardTermConfig] = Field(default_factory=lambda: {"task": RewardTermConfig()})
    """Terms by name, each a table such as `[reward.terms.task]`. Unset: one term `task` of the kind `evaluators`."""

    @field_validator("terms")
    @classmethod
    def _check_weights(cls, value: dict[str, RewardTermConfig]) -> dict[str, RewardTermConfig]:
        if not any(term.weight > 0 for term in value.values()):
            raise ValueError("at least one term needs a weight above 0")
        return value
