"""What the sizes of a run rule out, however good a machine it is given. Pure; knows sizes as numbers."""

from __future__ import annotations

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError


def refuse_what_does_not_fit(config: RunConfig, tokens_per_image: int) -> None:
    """Raise UserError for screenshots that are no prompt, and for more optimizer steps than episodes."""
    limit, episodes = config.inference.max_model_len, config.learner.grpo.groups_per_batch * config.tasks.rollouts
    shown = config.tasks.max_steps
    if config.agent.context == "window":
        shown = min(shown, config.agent.window_images)
    if shown * tokens_per_image > limit:
        raise UserError(
            f"{shown} screenshots of {tokens_per_image} tokens are {shown * tokens_per_image}, "
            f"and inference.max_model_len = {limit}",
            "raise that, or show fewer (agent.context, agent.window_images, tasks.max_steps) or smaller ones "
            "(agent.image_width, agent.image_height)",
        )
    if config.learner.grpo.minibatches > episodes:
        raise UserError(
            f"learner.grpo.minibatches = {config.learner.grpo.minibatches} optimizer steps share {episodes} episodes "
            "(learner.grpo.groups_per_batch x tasks.rollouts)",
            "lower the first",
        )
