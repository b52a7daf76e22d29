"""100,000 malformed inputs for each decoder, and as many messages to a replay service: no crash, no growth."""

from __future__ import annotations

import psutil
import pytest
from fuzz_kit import DECODERS, decode
from fuzz_wire import fuzz_replay
from hypothesis import HealthCheck, given, seed, settings
from replay_kit import StartReplay

NUM_INPUTS = 100_000
NUM_ROUNDS = 100
GROWTH_BYTES = 64 * 1024**2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_neither_crashes_nor_grows(name: str) -> None:
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

    # In rounds: hypothesis remembers all that it has drawn until it is done, which is growth of its own.
    seed(0)(fuzz)()
    before_bytes = psutil.Process().memory_info().rss
    for number in range(1, NUM_ROUNDS):
        seed(number)(fuzz)()
    assert psutil.Process().memory_info().rss - before_bytes < GROWTH_BYTES


@pytest.mark.timeout(3600)
def test_a_service_answers_every_message_and_does_not_grow(start_replay: StartReplay) -> None:
    replay = start_replay()
    process = psutil.Process(replay.process.pid)
    fuzz_replay(replay, 1000)
    before_bytes = process.memory_info().rss
    fuzz_replay(replay, NUM_INPUTS)
    assert process.memory_info().rss - before_bytes < GROWTH_BYTES
