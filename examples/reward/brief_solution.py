"""Reward: the value of the task's own evaluator, lowered by needless actions and by an unfinished last line.

Select it beside the task's evaluator, whose value it uses and which alone has the weight 0:

    [reward.terms.task]
    weight = 0.0

    [reward.terms.brief]
    kind = "brief_solution:BriefSolution"
    options = { num_actions = 3, path = "~/notes.txt" }
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from deskrl.actor.rewards.reward_interface import EndedEpisode, Score
from deskrl.core.config import Section


class BriefSolution:
    """Value of the term `task`, times the share of actions that a good solution needs, times the file's quality.

    Args:
        options: what a good solution needs.
    """

    class Options(Section):
        """Options of the reward."""

        num_actions: Annotated[int, Field(ge=1)]
        """Number of actions of a good solution; with twice as many, the value is halved."""
        path: str
        """Text file that the task asks for."""

    def __init__(self, options: Options) -> None:
        self._options = options

    async def score(self, episode: EndedEpisode) -> Score:
        """Return the value in [0, 1] and what it consists of."""
        brevity = min(1.0, self._options.num_actions / max(1, len(episode.actions)))
        quality = await self._quality(episode)
        return Score(episode.terms["task"] * brevity * quality, {"brevity": brevity, "quality": quality})

    async def _quality(self, episode: EndedEpisode) -> float:
        """Return 1.0 for a text whose last line is complete, otherwise 0.8.

        Errors other than a missing file are left to deskrl, which decides whether they are a fault.
        """
        try:
            text = await episode.desktop.read_file(self._options.path)
        except FileNotFoundError:  # the policy did not write it, or wrote something other than a regular file
            return 0.0
        return 1.0 if text.endswith(b"\n") else 0.8
