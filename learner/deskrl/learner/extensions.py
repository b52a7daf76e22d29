"""Check of the learner's extension points: loss, advantage, task sampler, trackers and model architecture."""

from __future__ import annotations

from deskrl.core.config import RunConfig
from deskrl.learner.advantages import select_advantage
from deskrl.learner.loss_registry import select_loss
from deskrl.learner.metrics.run_trackers import select_trackers
from deskrl.learner.policy.architectures import check_architecture
from deskrl.learner.task_samplers import select_task_sampler


def check_extensions(config: RunConfig) -> None:
    """Check that everything that the configuration selects for the learner exists and accepts its options.

    Loads no engine unless an extension does.

    Raises:
        UserError: an extension cannot be selected, or the package of a tracker is not installed.
    """
    select_loss(config.learner.grpo)
    select_advantage(config.learner.grpo)
    select_task_sampler(config.tasks)
    select_trackers(config)
    check_architecture(config.model)
