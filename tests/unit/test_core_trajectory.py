"""A step reads back as it was written; anything else is refused."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.trajectory import MAX_STEP_BYTES, CodecError, Span, Step, decode_step, encode_step

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
        spans=(Span(draw(st.text(max_size=5)), draw(st.integers(0, 9)), 0, len(action_ids)),),
        messages=tuple(draw(st.lists(st.binary(max_size=10), max_size=2))),
        action={"kind": "click", "x": draw(st.integers(0, 5000))},
        timings_ms={"act": draw(floats)},
    )


@given(steps())
def test_a_step_reads_back_as_it_was_written(step: Step) -> None:
    assert decode_step(encode_step(step)) == step
    assert decode_step(encode_step(step), with_ids=False) == replace(step, prompt_ids=(), action_ids=(), logprobs=())


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_and_nothing_else_is_raised(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode_step(data)


def test_ids_and_logprobs_that_differ_in_number_are_refused() -> None:
    step = Step(0, "a", ("a",), "x", action_ids=(1, 2), logprobs=(-0.5,))
    for with_ids in (True, False):
        with pytest.raises(CodecError, match="2 action ids with 1 logprobs"):
            decode_step(encode_step(step), with_ids=with_ids)


@pytest.mark.parametrize("array", [b"abc", "abcd", [1]])
def test_ids_that_are_no_array_are_refused_though_nobody_looks_at_them(array: object) -> None:
    record = msgpack.unpackb(encode_step(Step(0, "a", (), "x")))
    for with_ids in (True, False):
        with pytest.raises(CodecError, match="no array"):
            decode_step(msgpack.packb({**record, "prompt_ids": array}), with_ids=with_ids)


def test_a_step_of_another_schema_is_refused() -> None:
    record = msgpack.unpackb(encode_step(Step(0, "a", (), "x")))
    with pytest.raises(CodecError, match="another schema"):
        decode_step(msgpack.packb({**record, "schema": 99}))


def test_an_oversized_step_is_refused_on_both_sides() -> None:
    with pytest.raises(CodecError, match="over the limit"):
        encode_step(Step(0, "a", (), "x" * MAX_STEP_BYTES))
    with pytest.raises(CodecError, match="over the limit"):
        decode_step(b"x" * (MAX_STEP_BYTES + 1))
