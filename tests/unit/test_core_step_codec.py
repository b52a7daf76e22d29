"""Serialised steps: round trip, and rejection of malformed bytes."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.step_codec import MAX_STEP_BYTES, CodecError, Step, VersionSpan, decode_step, encode_step

ids = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
floats = st.floats(width=32, allow_nan=False)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    action_ids = draw(ids)
    return Step(
        index=draw(st.integers(0, 1000)),
        screenshot=draw(st.text(max_size=8)),
        images=tuple(draw(st.lists(st.text(max_size=8), max_size=3))),
        text=draw(st.text(max_size=30)),
        prompt_ids=draw(ids),
        action_ids=action_ids,
        logprobs=tuple(draw(floats) for _ in action_ids),
        spans=(VersionSpan(draw(st.text(max_size=5)), draw(st.integers(0, 9)), 0, len(action_ids)),),
        messages=tuple(draw(st.lists(st.binary(max_size=10), max_size=2))),
        action={"kind": "click", "x": draw(st.integers(0, 5000))},
        timings_ms={"act": draw(floats)},
    )


@given(steps())
def test_a_step_is_decoded_as_it_was_encoded(step: Step) -> None:
    assert decode_step(encode_step(step)) == step
    assert decode_step(encode_step(step), with_ids=False) == replace(step, prompt_ids=(), action_ids=(), logprobs=())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_codec_error(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode_step(data)


def test_different_numbers_of_ids_and_logprobs_are_rejected() -> None:
    step = Step(0, "a", ("a",), "x", action_ids=(1, 2), logprobs=(-0.5,))
    for with_ids in (True, False):
        with pytest.raises(CodecError, match="2 action ids with 1 logprobs"):
            decode_step(encode_step(step), with_ids=with_ids)


@pytest.mark.parametrize("array", [b"abc", "abcd", [1]])
def test_malformed_arrays_are_rejected_even_without_ids(array: object) -> None:
    record = msgpack.unpackb(encode_step(Step(0, "a", (), "x")))
    for with_ids in (True, False):
        with pytest.raises(CodecError, match="not an array"):
            decode_step(msgpack.packb({**record, "prompt_ids": array}), with_ids=with_ids)


def test_a_step_of_another_schema_version_is_rejected() -> None:
    record = msgpack.unpackb(encode_step(Step(0, "a", (), "x")))
    with pytest.raises(CodecError, match="unsupported schema version"):
        decode_step(msgpack.packb({**record, "schema": 99}))


def test_an_oversized_step_is_rejected_by_both_sides() -> None:
    with pytest.raises(CodecError, match="exceeds the limit"):
        encode_step(Step(0, "a", (), "x" * MAX_STEP_BYTES))
    with pytest.raises(CodecError, match="exceeds the limit"):
        decode_step(b"x" * (MAX_STEP_BYTES + 1))
