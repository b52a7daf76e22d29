"""Serialised form of a step: msgpack, with token ids and logprobs as little-endian 32-bit arrays."""

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
    """Bytes that do not follow the stored format."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of an action, sampled under policy version (lineage, step)."""

    lineage: str
    step: int
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """One step of an episode: observation, sampled tokens and executed action.

    Sampled steps hold token ids, logprobs and policy versions exactly as the engine returned them. Scripted steps
    (demonstrations) hold the conversation in `messages` instead, ending with the text of the action.
    """

    index: int
    screenshot: str
    """Hash of the newest screenshot in the prompt, scaled as the policy sees it."""
    images: tuple[str, ...]
    """Hashes of all screenshots in the prompt, in their order."""
    text: str
    """Decoded action tokens: thought and action."""
    prompt_ids: tuple[int, ...] = ()
    action_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    spans: tuple[VersionSpan, ...] = ()
    processor_hash: str = ""
    temperature: float = 1.0
    messages: tuple[bytes, ...] = ()
    """Serialised messages, each a deskrl.proto.v1.ChatMessage."""
    action: dict[str, Any] = field(default_factory=dict)
    """Parsed action in screen pixels, for viewers: {"kind": "click", "x": …, "y": …}."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Latency by part; see `deskrl.core.latency_breakdown`."""


def encode_step(step: Step) -> bytes:
    """Serialise a step.

    Raises:
        CodecError: the serialised step is larger than MAX_STEP_BYTES.
    """
    # `asdict` copies every token id, which took most of the CPU time of an actor.
    fields = vars(step)
    arrays = {name: struct.pack(f"<{len(fields[name])}{kind}", *fields[name]) for name, kind in _ARRAYS.items()}
    record = fields | arrays | {"schema": _SCHEMA, "spans": [vars(span) for span in step.spans]}
    data: bytes = msgpack.packb(record)
    if len(data) > MAX_STEP_BYTES:
        raise CodecError(f"a step of {len(data)} bytes exceeds the limit of {MAX_STEP_BYTES}")
    return data


def decode_step(data: bytes, *, with_ids: bool = True) -> Step:
    """Deserialise a step.

    Args:
        data: result of `encode_step`.
        with_ids: False leaves token ids and logprobs empty after checking them, which is faster.

    Raises:
        CodecError: the bytes do not follow the format.
    """
    if len(data) > MAX_STEP_BYTES:
        raise CodecError(f"a step of {len(data)} bytes exceeds the limit of {MAX_STEP_BYTES}")
    try:
        record = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
        if record.pop("schema") != _SCHEMA:
            raise CodecError("unsupported schema version of a step")
        num = {name: _num_items(record[name]) for name in _ARRAYS}
        if num["logprobs"] != num["action_ids"]:
            raise CodecError(f"{num['action_ids']} action ids with {num['logprobs']} logprobs")
        for name, kind in _ARRAYS.items():
            record[name] = struct.unpack(f"<{num[name]}{kind}", record[name]) if with_ids else ()
        record["images"] = tuple(record["images"])
        record["spans"] = tuple(VersionSpan(**span) for span in record["spans"])
        record["messages"] = tuple(record["messages"])
        step = Step(**record)
        _check_types(step)
        return step
    except CodecError:
        raise
    except Exception as error:  # msgpack and malformed records raise many types of errors
        raise CodecError(f"not a step: {error}") from error


def _check_types(step: Step) -> None:
    """Raise CodecError if the type of a field differs from its annotation."""
    values: tuple[tuple[type, Iterable[object]], ...] = (
        (int, (step.index, *(number for span in step.spans for number in (span.step, span.start, span.end)))),
        (str, (step.screenshot, step.text, step.processor_hash, *step.images, *(span.lineage for span in step.spans))),
        (bytes, step.messages),
        (dict, (step.action, step.timings_ms)),
    )
    if not all(type(one) is kind for kind, of_kind in values for one in of_kind):
        raise CodecError("a field of the step has the wrong type")
    numbers = (step.temperature, *step.timings_ms.values())
    if not all(type(number) in (int, float) for number in numbers):
        raise CodecError("a temperature or a timing is not a number")


def _num_items(array: Any) -> int:
    if not isinstance(array, bytes) or len(array) % _ITEM_BYTES:
        raise CodecError("token ids or logprobs are not an array of 32-bit values")
    return len(array) // _ITEM_BYTES
