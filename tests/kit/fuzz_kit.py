"""Malformed input for everything that decodes what another process sent, and how each may answer it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
from hypothesis import strategies as st
from PIL import Image

from deskrl.actor.agent.grammar import FormatError, parse_turn
from deskrl.actor.tasks.files import OWN_SUITE, parse_task
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.trajectory import CodecError, Span, Step, decode_step, encode_step
from deskrl.inference.images import ImageError, decode_image
from deskrl.replay.images import parse_hash
from deskrl.replay.refusals import Malformed

STEP = Step(
    index=3,
    screenshot="ab" * 32,
    images=("ab" * 32, "cd" * 32),
    text="Thought: x.\nAction: wait()",
    prompt_ids=(1, 2, 3),
    action_ids=(4, 5),
    logprobs=(-0.5, -0.25),
    spans=(Span("lineage", 7, 0, 2),),
    messages=(b"\x08\x01",),
    action={"kind": "click", "x": 1, "y": 2},
    timings_ms={"act": 1.0},
)


class Decoder(NamedTuple):
    """Something that takes bytes (or text) from outside, and the one way in which it may refuse them."""

    inputs: st.SearchStrategy[Any]
    decode: Callable[[Any], object]
    refusal: type[Exception]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """What is well formed, with some of it changed, cut out, repeated or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 16)))
        data[start:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[start:end]) * 2)))
    return bytes(data)


def anything() -> st.SearchStrategy[Any]:
    """Values of all kinds that msgpack and JSON have, within one another."""
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@st.composite
def steps_of_other_types(draw: st.DrawFn) -> bytes:
    """A step whose fields are there, some of them with values of another kind."""
    record = msgpack.unpackb(encode_step(STEP))
    for name in draw(st.sets(st.sampled_from(sorted(record)), min_size=1, max_size=3)):
        record[name] = draw(anything())
    return bytes(msgpack.packb(record))


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


TASK = next(OWN_SUITE.glob("examples/os/*.json")).read_bytes()
TURN = "Thought: Go on.\nAction: click(start_box='<|box_start|>(10,20)<|box_end|>')"


def use_step(step: Step) -> None:
    """What a step is taken for by those who decode it."""
    assert type(step.index) is int and all(type(text) is str for text in (step.screenshot, step.text, *step.images))
    assert all(type(message) is bytes for message in step.messages)
    assert all(isinstance(value, int | float) for value in (step.temperature, *step.timings_ms.values()))
    assert type(step.action) is dict and type(step.processor_hash) is str
    for span in step.spans:
        assert [type(value) for value in (span.lineage, span.step, span.start, span.end)] == [str, int, int, int]
    assert encode_step(step)


DECODERS = {
    "steps": Decoder(
        st.one_of(st.binary(), damaged(encode_step(STEP)), steps_of_other_types(), anything().map(msgpack.packb)),
        lambda data: use_step(decode_step(data)),
        CodecError,
    ),
    "screenshots": Decoder(
        st.one_of(st.binary(), damaged(_picture())), lambda data: decode_image(image_hash(data), data), ImageError
    ),
    "names of screenshots": Decoder(st.text(), parse_hash, Malformed),
    "turns": Decoder(
        st.one_of(st.text(), damaged(TURN.encode()).map(lambda data: data.decode(errors="replace"))),
        parse_turn,
        FormatError,
    ),
    "tasks": Decoder(
        st.one_of(st.binary(), damaged(TASK), anything().map(lambda value: json.dumps(value, default=str).encode())),
        lambda data: parse_task(data, "task"),
        UserError,
    ),
}


def decode(decoder: Decoder, data: Any) -> None:
    """Decode or be refused in the one way that is allowed; any other exception is a finding."""
    with contextlib.suppress(decoder.refusal):
        decoder.decode(data)
