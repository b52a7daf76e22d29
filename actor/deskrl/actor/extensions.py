"""Check of the extension points that an actor uses.

`deskrl doctor` imports this module on machines without the packages of the extra `actor`.
"""

from __future__ import annotations

from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.core.config import RunConfig


def check_extensions(config: RunConfig) -> None:
    """Select every implementation that an actor of the run uses, so that an error is found before the run starts.

    Raises:
        UserError: an implementation is unknown, cannot be imported, or rejects its options.
    """
    select_language(config.agent)
    select_provider(config.desktop)
    make_reward(config)
