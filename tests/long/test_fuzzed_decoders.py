"""100,000 malformed inputs for each decoder, and as many messages to a replay service: no crash, no growth."""

from __future__ import annotations

import psutil
import pytest
from fuzz_kit import DECODERS, decode
from fuzz_wire import fuzz_replay
from hypothesis import HealthCheck, given, settings
from replay_kit import StartReplay

NUM_INPUTS = 100_000
GROWTH_BYTES = 64 * 1024**2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_neither_crashes_nor_grows(name: str) -> None:
    @settings(max_examples=NUM_INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=DECODERS[name].inputs)
    def fuzz(data: object) -> None:
        decode(DECODERS[name], data)

    before_bytes = psutil.Process().memory_info().rss
    fuzz()
    assert psutil.Process().memory_info().rss - before_bytes < GROWTH_BYTES


@pytest.mark.timeout(3600)
def test_a_service_answers_every_message_and_does_not_grow(start_replay: StartReplay) -> None:
    replay = start_replay()
    process = psutil.Process(replay.process.pid)
    fuzz_replay(replay, 1000)
    before_bytes = process.memory_info().rss
    fuzz_replay(replay, NUM_INPUTS)
    assert process.memory_info().rss - before_bytes < GROWTH_BYTES
