"""A replay service under damaged messages: a sample of what tests/long sends 100,000 times."""

from __future__ import annotations

from fuzz_wire import fuzz_replay
from replay_kit import StartReplay


def test_every_damaged_message_is_answered_and_none_by_an_accident(start_replay: StartReplay) -> None:
    fuzz_replay(start_replay(), 600)
