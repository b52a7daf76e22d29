"""Decoders and the replay service handle 100,000 malformed inputs each without crashes or memory growth."""

from __future__ import annotations

import psutil
import pytest
from decoder_fuzz_kit import DECODERS, decode
from hypothesis import HealthCheck, given, seed, settings
from replay_fuzz_kit import fuzz_replay
from replay_kit import StartReplay

NUM_INPUTS = 100_000
NUM_ROUNDS = 100
MAX_GROWTH_BYTES = 64 * 1024**2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_handles_malformed_inputs_without_memory_growth(name: str) -> None:
    @settings(
        max_examples=NUM_INPUTS // NUM_ROUNDS,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=DECODERS[name].inputs)
    def fuzz(data: object) -> None:
        decode(DECODERS[name], data)

    # In rounds, as Hypothesis keeps all examples of a run in memory.
    seed(0)(fuzz)()
    before_bytes = psutil.Process().memory_info().rss
    for number in range(1, NUM_ROUNDS):
        seed(number)(fuzz)()
    assert psutil.Process().memory_info().rss - before_bytes < MAX_GROWTH_BYTES


@pytest.mark.timeout(3600)
def test_replay_handles_damaged_messages_without_memory_growth(start_replay: StartReplay) -> None:
    replay = start_replay()
    process = psutil.Process(replay.process.pid)
    fuzz_replay(replay, 1000)
    before_bytes = process.memory_info().rss
    fuzz_replay(replay, NUM_INPUTS)
    assert process.memory_info().rss - before_bytes < MAX_GROWTH_BYTES
