"""Reward `evaluators`: the task's own evaluator, one of OSWorld's or built in."""

from __future__ import annotations

from typing import ClassVar

from deskrl.actor.rewards.reward_interface import EndedEpisode, Score


class TaskEvaluators:
    """The task's own evaluator. It runs after all terms with `needs_session`, because it stops all programs.

    Its errors are classified as those of `evaluate_task`: a state that it cannot read is the policy's failure.
    """

    needs_session: ClassVar[bool] = True

    async def score(self, episode: EndedEpisode) -> Score:
        """Return the evaluator's reward with its evidence; raises the errors of `evaluate_task`."""
        evaluation = await episode.desktop.evaluate_task(episode.task, episode.final_action)
        return Score(evaluation.reward, evaluation.evidence)
