"""One step of an episode as it is stored and sent: msgpack inside the protobuf envelope.

Knows the format and its limits, nothing of who writes it. Token ids and logprobs travel as little-endian 32-bit arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

MAX_STEP_BYTES = 16 * 1024**2
_SCHEMA = 1
_ARRAYS = {"prompt_ids": "I", "action_ids": "I", "logprobs": "f"}
_ITEM_BYTES = 4


class CodecError(ValueError):
    """Bytes that are no step of this format."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of an action were sampled under version (lineage, step)."""

    lineage: str
    step: int
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """One turn of the policy: what it saw, what it sampled, what was done with it.

    Sampled steps carry ids, logprobs and versions exactly as the engine gave them; scripted ones (demonstrations)
    carry the conversation instead, in `messages`, with the action's text as its last one.
    """

    index: int
    screenshot: str
    """Hash of the screenshot that the step was decided on, as the policy saw it (already scaled)."""
    images: tuple[str, ...]
    """Hashes of all screenshots in the prompt, in prompt order."""
    text: str
    """The action as sampled, decoded: thought and action."""
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    spans: tuple[Span, ...] = ()
    processor_hash: str = ""
    temperature: float = 1.0
    messages: tuple[bytes, ...] = ()
    """Serialised deskrl.proto.v1.ChatMessage, one each."""
    action: dict[str, Any] = field(default_factory=dict)
    """The parsed action in screen pixels, for a viewer: {"kind": "click", "x": …, "y": …}."""
    timings_ms: dict[str, float] = field(default_factory=dict)


def encode_step(step: Step) -> bytes:
    """Msgpack of a step; raises CodecError if it is larger than MAX_STEP_BYTES."""
    # Not `asdict`: it would copy every token id, which took most of an actor's time.
    fields = vars(step)
    arrays = {name: struct.pack(f"<{len(fields[name])}{kind}", *fields[name]) for name, kind in _ARRAYS.items()}
    record = fields | arrays | {"schema": _SCHEMA, "spans": [vars(span) for span in step.spans]}
    data: bytes = msgpack.packb(record)
    if len(data) > MAX_STEP_BYTES:
        raise CodecError(f"a step of {len(data)} bytes is over the limit of {MAX_STEP_BYTES}")
    return data


def decode_step(data: bytes, *, with_ids: bool = True) -> Step:
    """The step in `data`; raises CodecError for anything that `encode_step` would not write.

    Args:
        data: as `encode_step` made it.
        with_ids: False leaves token ids and logprobs empty, though checked: for those who look at the rest only.
    """
    if len(data) > MAX_STEP_BYTES:
        raise CodecError(f"a step of {len(data)} bytes is over the limit of {MAX_STEP_BYTES}")
    try:
        record = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
        if record.pop("schema") != _SCHEMA:
            raise CodecError("a step of another schema version")
        num = {name: _num_items(record[name]) for name in _ARRAYS}
        if num["logprobs"] != num["action_ids"]:
            raise CodecError(f"{num['action_ids']} action ids with {num['logprobs']} logprobs")
        for name, kind in _ARRAYS.items():
            record[name] = struct.unpack(f"<{num[name]}{kind}", record[name]) if with_ids else ()
        record["images"] = tuple(record["images"])
        record["spans"] = tuple(Span(**span) for span in record["spans"])
        record["messages"] = tuple(record["messages"])
        step = Step(**record)
        _refuse_other_types(step)
        return step
    except CodecError:
        raise
    except Exception as error:  # msgpack and malformed records fail in many ways; all mean one thing here
        raise CodecError(f"not a step: {error}") from error


def _refuse_other_types(step: Step) -> None:
    """Raise CodecError where a field holds a value of another type than its annotation: nobody checks it later."""
    values: tuple[tuple[type, Iterable[object]], ...] = (
        (int, (step.index, *(number for span in step.spans for number in (span.step, span.start, span.end)))),
        (str, (step.screenshot, step.text, step.processor_hash, *step.images, *(span.lineage for span in step.spans))),
        (bytes, step.messages),
        (dict, (step.action, step.timings_ms)),
    )
    if not all(type(one) is kind for kind, of_kind in values for one in of_kind):
        raise CodecError("a field of the step is of another type")
    numbers = (step.temperature, *step.timings_ms.values())
    if not all(type(number) in (int, float) for number in numbers):
        raise CodecError("a temperature or a timing is no number")


def _num_items(array: Any) -> int:
    if not isinstance(array, bytes) or len(array) % _ITEM_BYTES:
        raise CodecError("token ids or logprobs are no array")
    return len(array) // _ITEM_BYTES
