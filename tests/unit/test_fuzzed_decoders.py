"""Whatever another process sends is decoded or refused: a sample of what tests/long tries 100,000 times."""

from __future__ import annotations

import pytest
from fuzz_kit import DECODERS, decode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_malformed_input_is_refused_in_the_one_way_that_callers_know(name: str, data: st.DataObject) -> None:
    decode(DECODERS[name], data.draw(DECODERS[name].inputs))
