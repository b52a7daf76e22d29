"""Progress of an export or an import, as one line now and then."""

from __future__ import annotations

import time

from deskrl.core.left_out import count_of

_INTERVAL_S = 15.0


class ProgressLines:
    """Counts episodes and steps, and prints both at intervals."""

    def __init__(self) -> None:
        self.num_episodes = 0
        self.num_steps = 0
        self._printed_s = time.monotonic()

    def add_episode(self, num_steps: int) -> None:
        """Count an episode, and print a line if the last one is older than the interval."""
        self.num_episodes += 1
        self.num_steps += num_steps
        if time.monotonic() - self._printed_s >= _INTERVAL_S:
            self._printed_s = time.monotonic()
            print(f"{self} so far", flush=True)

    def __str__(self) -> str:
        return f"{count_of(self.num_episodes, 'episode')} with {count_of(self.num_steps, 'step')}"
