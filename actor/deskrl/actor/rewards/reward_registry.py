"""Registry of rewards: the built-in kinds, those of installed packages, and import paths."""

from __future__ import annotations

import inspect
from typing import Any

from deskrl.actor.rewards.task_evaluators import TaskEvaluators
from deskrl.actor.rewards.vision_language_judge import VisionLanguageJudge
from deskrl.core.registry import Registry, missing_arguments


def _find_problem(found: Any) -> str | None:
    options = ["options"] if getattr(found, "Options", None) is not None else []
    if not inspect.isclass(found):
        return missing_arguments(found, "episode", *options)
    score = getattr(found, "score", None)
    if not callable(score):
        return "it has no method score"
    problem = missing_arguments(found, *options)
    return f"its constructor: {problem}" if problem else missing_arguments(score, "self", "episode")


REWARDS: Registry[Any] = Registry("reward", "reward.terms", "deskrl.rewards", _find_problem)
"""Rewards by name: classes with a method `score` (see `Reward`), or functions of an `EndedEpisode`. A function with an
attribute `Options` gets an instance of it as the second argument."""

REWARDS.register("evaluators")(TaskEvaluators)
REWARDS.register("vision_language_judge")(VisionLanguageJudge)
