"""Fuzz test of all decoders of external input, with fewer examples than in tests/long."""

from __future__ import annotations

import pytest
from decoder_fuzz_kit import DECODERS, decode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_malformed_input_raises_only_the_documented_error(name: str, data: st.DataObject) -> None:
    decode(DECODERS[name], data.draw(DECODERS[name].inputs))
