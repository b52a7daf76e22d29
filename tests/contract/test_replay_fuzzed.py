"""Replay service under damaged messages; tests/long sends 100,000 of them."""

from __future__ import annotations

from replay_fuzz_kit import fuzz_replay
from replay_kit import StartReplay


def test_every_damaged_message_is_answered_with_an_expected_status(start_replay: StartReplay) -> None:
    fuzz_replay(start_replay(), 600)
