"""Options that all providers of environments have: actions, instruction and reward."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from deskrl.actor.environments.gestures import check_table
from deskrl.core.config import Section

Return = Annotated[float, Field(ge=-1e12, le=1e12)]


class EnvironmentOptions(Section):
    """Options of an environment."""

    actions: dict[str, Any] = Field(default_factory=dict)
    """Action of the environment for each gesture of the policy: `click`, `double_click`, `triple_click`, `right_click`,
    `middle_click`, `move`, `drag`, `scroll`, `type`, `wait`, or a key press such as `press left` or `press ctrl+s`. A
    text such as `{x}` stands for a value of the gesture. Gestures that are not named have no effect."""
    instruction: str = ""
    """What the policy is asked to do; empty: the instruction of the task."""
    instruction_key: str = ""
    """Key of the observation, or of the info, of a reset that contains the instruction of the episode; empty: the
    environment gives none. It follows `instruction`."""
    min_return: Return = 0.0
    """Return (sum of the environment's rewards) that gives the reward 0, as any lower one does."""
    max_return: Return = 1.0
    """Return that gives the reward 1, as any higher one does. Between the two, the reward is linear."""
    requires_end: bool = True
    """Whether an episode that the environment has not ended gets the reward 0. False: its return counts, as in
    environments whose aim is to continue; a policy may then end an episode to avoid negative rewards."""

    @field_validator("actions")
    @classmethod
    def _check_actions(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_table(value)

    @model_validator(mode="after")
    def _check_returns(self) -> EnvironmentOptions:
        if self.min_return >= self.max_return:
            raise ValueError("min_return must be less than max_return")
        return self

    def reward(self, episode_return: float, has_ended: bool) -> float:
        """Return the reward of an episode, in [0, 1].

        Args:
            episode_return: sum of the environment's rewards.
            has_ended: whether the environment has ended the episode.
        """
        if self.requires_end and not has_ended:
            return 0.0
        share = (episode_return - self.min_return) / (self.max_return - self.min_return)
        return min(1.0, max(0.0, share))
