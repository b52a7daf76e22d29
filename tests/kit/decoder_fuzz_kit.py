"""Malformed inputs for all decoders of external data, and the error that each may raise."""

from __future__ import annotations

import atexit
import contextlib
import copy
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
from hypothesis import strategies as st
from model_folder_kit import write_model_folder
from PIL import Image
from vendor_api_kit import anthropic_reply, openai_reply

from deskrl.actor import image_decoding
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.anthropic_messages import read_reply as read_anthropic_reply
from deskrl.actor.agent.external_policy import ExternalClient
from deskrl.actor.agent.external_server import UnavailableError
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.openai_responses import read_reply as read_openai_reply
from deskrl.actor.agent.ui_tars_parser import parse_response
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.guest_replies import CommandReply, WindowRecord
from deskrl.actor.desktops.http_client import GuestResponse
from deskrl.actor.image_decoding import DEFAULT_FORMATS, OPTIONAL_FORMATS
from deskrl.actor.tasks.task_schema import OWN_SUITE, parse_task
from deskrl.core.addresses import AddressError, HostPort
from deskrl.core.config import AgentConfig, InferenceConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.step_codec import CodecError, Step, VersionSpan, decode_step, encode_step
from deskrl.inference.image_cache import ImageError, decode_image
from deskrl.models.model_checks import check_complete
from deskrl.models.model_checks.safetensors_header import read_header
from deskrl.replay.image_index import parse_hash
from deskrl.replay.status_errors import InvalidRequestError

STEP = Step(
    index=3,
    screenshot="ab" * 32,
    images=("ab" * 32, "cd" * 32),
    text="Thought: x.\nAction: wait()",
    prompt_ids=(1, 2, 3),
    action_ids=(4, 5),
    logprobs=(-0.5, -0.25),
    spans=(VersionSpan("lineage", 7, 0, 2),),
    messages=(b"\x08\x01",),
    action={"kind": "click", "x": 1, "y": 2},
    timings_ms={"act": 1.0},
)


CALLS = {
    name: select_language(AgentConfig(action_language=name))
    for name in ("qwen3_vl", "opencua", "anthropic_computer_use", "openai_computer_use")
}
ACTIONS = (
    Action(ActionKind.DRAG, x=1, y=2, end_x=3, end_y=4),
    Action(ActionKind.HOTKEY, keys=("ctrl", "s")),
    Action(ActionKind.TYPE, text="it's"),
    Action(ActionKind.FINISHED, text="42"),
)
TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "computer", "input": {"action": "screenshot"}}
COMPUTER_CALL = {"type": "computer_call", "call_id": "call_1", "actions": [{"type": "wait"}]}
VENDOR_CLIENT = ExternalClient(InferenceConfig(external_url="http://127.0.0.1:9/v1", external_model="m"), 1.0)


class Decoder(NamedTuple):
    """Decoder of external bytes or text, a strategy for its inputs, and the only error that it may raise."""

    inputs: st.SearchStrategy[Any]
    decode: Callable[[Any], object]
    error: type[Exception]


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Generate valid data with parts changed, removed, repeated or inserted."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 16)))
        data[start:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[start:end]) * 2)))
    return bytes(data)


def damaged_call(form: tuple[str, Action]) -> st.SearchStrategy[tuple[str, str]]:
    """Generate the name of an action language, and a damaged response in it."""
    name, action = form
    valid = CALLS[name].render(PolicyResponse("It is filled in.", action)).encode()
    return st.tuples(st.just(name), damaged(valid).map(lambda data: data.decode(errors="replace")))


def parse_call(form: tuple[str, str]) -> None:
    """Parse a response in an action language."""
    name, text = form
    CALLS[name].parse(text, (1000, 1000))


@st.composite
def changed_reply(draw: st.DrawFn, valid: dict[str, Any]) -> Any:
    """Generate a reply of a vendor's server in which one value, at any depth, is another one."""
    value = copy.deepcopy(valid)
    place: Any = value
    while True:
        key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else 0
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            place[key] = draw(nested_values())
            return value
        place = place[key]


def read_vendor_reply(form: tuple[Callable[[Any], Any], Any]) -> None:
    """Read a reply of a vendor's server as the client does."""
    read, reply = form
    try:
        _, *_, texts = VENDOR_CLIENT._read("messages", reply, read)
    except UnavailableError:
        return
    assert texts and all(isinstance(text, str) for text in texts)


def nested_values() -> st.SearchStrategy[Any]:
    """Generate nested values of all types of msgpack and JSON."""
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@st.composite
def steps_with_wrong_types(draw: st.DrawFn) -> bytes:
    """Generate steps in which some fields have values of a wrong type."""
    record = msgpack.unpackb(encode_step(STEP))
    for name in draw(st.sets(st.sampled_from(sorted(record)), min_size=1, max_size=3)):
        record[name] = draw(nested_values())
    return bytes(msgpack.packb(record))


def replies(valid: bytes) -> st.SearchStrategy[bytes]:
    """Generate replies of guest servers: any bytes, damaged replies, and JSON of other types."""
    values = nested_values().map(lambda value: json.dumps(value, default=str).encode())
    return st.one_of(st.binary(), damaged(valid), values)


def _make_image(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, image_format)
    return file.getvalue()


WINDOW = {"id": 1, "title": "a", "window_class": "b", "x": 0, "y": 0, "width": 3, "height": 4}
TASK = next(OWN_SUITE.glob("examples/os/*.json")).read_bytes()
RESPONSE = "Thought: Go on.\nAction: click(start_box='<|box_start|>(10,20)<|box_end|>')"


def check_step_types(step: Step) -> None:
    """Assert the field types on which users of a decoded step rely."""
    assert type(step.index) is int and all(type(text) is str for text in (step.screenshot, step.text, *step.images))
    assert all(type(message) is bytes for message in step.messages)
    assert all(isinstance(value, int | float) for value in (step.temperature, *step.timings_ms.values()))
    assert type(step.action) is dict and type(step.processor_hash) is str
    for span in step.spans:
        assert [type(value) for value in (span.lineage, span.step, span.start, span.end)] == [str, int, int, int]
    assert encode_step(step)


def check_command_reply(reply: CommandReply) -> None:
    """Assert the field types on which users of a command's result rely."""
    assert [type(value) for value in (reply.returncode, reply.output, reply.error)] == [int, str, str]


def check_windows(windows: list[WindowRecord]) -> None:
    """Assert the field types on which users of a window list rely."""
    for window in windows:
        types = {name: type(value) for name, value in window.items()}
        assert all(types[name] is type(value) for name, value in WINDOW.items())


def check_error(message: str) -> None:
    """Assert that an error message is one line of limited length."""
    assert len(message) <= 1000 and message == " ".join(message.split())


def check_image(image: Image.Image) -> None:
    """Assert that a decoded image is usable and of limited size."""
    assert image.mode == "RGB" and 0 < image.width * image.height <= image_decoding.MAX_PIXELS
    image.tobytes()


HEADER = {"__metadata__": {}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
SAFETENSORS = len(json.dumps(HEADER)).to_bytes(8, "little") + json.dumps(HEADER).encode() + bytes(12)
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "index")


@cache
def model_folder() -> Path:
    """Return a complete model folder in several shards, which the process removes when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="deskrl-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_model_folder(folder, num_shards=2)


def model_file(name: str) -> Path:
    """Return a small file of the model folder."""
    return model_folder() / ("model.safetensors.index.json" if name == "index" else name)


@st.composite
def changed_model_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Generate another content of a model folder's small file: damaged, or with values of other types."""
    name = draw(st.sampled_from(MODEL_FILES))
    valid = model_file(name).read_bytes()
    if draw(st.booleans()):
        return name, draw(damaged(valid))
    content = json.loads(valid)
    for key in draw(st.sets(st.sampled_from(sorted(content)), min_size=1, max_size=2)):
        content[key] = draw(nested_values())
    return name, json.dumps(content, default=str).encode()


def check_model_folder(file: tuple[str, bytes]) -> None:
    """Check the model folder with another content of a file, and restore the file."""
    path = model_file(file[0])
    valid = path.read_bytes()
    try:
        path.write_bytes(file[1])
        check_complete(model_folder())
    finally:
        path.write_bytes(valid)


def check_header(data: bytes) -> None:
    """Read the header of a file with these bytes; each tensor must lie within the file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        for tensor in read_header(Path(file.name)).values():
            assert math.prod(tensor.shape) <= 8 * len(data)


DECODERS = {
    "addresses": Decoder(st.one_of(st.text(), st.text("[]:.@/% abcf019-_")), HostPort, AddressError),
    "safetensors headers": Decoder(
        st.one_of(
            st.binary(),
            damaged(SAFETENSORS),
            nested_values()
            .map(lambda value: json.dumps({"a": value}, default=str).encode())
            .map(lambda header: len(header).to_bytes(8, "little") + header),
        ),
        check_header,
        UserError,
    ),
    "model folders": Decoder(changed_model_files(), check_model_folder, UserError),
    "steps": Decoder(
        st.one_of(
            st.binary(), damaged(encode_step(STEP)), steps_with_wrong_types(), nested_values().map(msgpack.packb)
        ),
        lambda data: check_step_types(decode_step(data)),
        CodecError,
    ),
    "screenshots": Decoder(
        st.one_of(st.binary(), damaged(_make_image("PNG"))),
        lambda data: decode_image(image_hash(data), data),
        ImageError,
    ),
    "screenshot hashes": Decoder(st.text(), parse_hash, InvalidRequestError),
    "actions": Decoder(
        st.one_of(st.text(), damaged(RESPONSE.encode()).map(lambda data: data.decode(errors="replace"))),
        parse_response,
        FormatError,
    ),
    "tool calls": Decoder(
        st.tuples(st.sampled_from(sorted(CALLS)), st.sampled_from(ACTIONS)).flatmap(damaged_call),
        parse_call,
        FormatError,
    ),
    "replies of vendors' servers": Decoder(
        st.one_of(
            st.tuples(st.just(read_anthropic_reply), changed_reply(anthropic_reply(TOOL_USE).body)),
            st.tuples(st.just(read_openai_reply), changed_reply(openai_reply(COMPUTER_CALL).body)),
        ),
        read_vendor_reply,
        InferenceError,
    ),
    "replies of guests to commands": Decoder(
        replies(b'{"returncode": 0, "output": "a \\u00e9 b", "error": ""}'),
        lambda data: check_command_reply(GuestResponse(200, {}, data).decode(CommandReply)),
        DesktopError,
    ),
    "window lists of guests": Decoder(
        replies(json.dumps([WINDOW]).encode()),
        lambda data: check_windows(GuestResponse(200, {}, data).decode(list[WindowRecord])),
        DesktopError,
    ),
    "errors of guests": Decoder(
        replies(b'{"error": "no such file"}'),
        lambda data: check_error(GuestResponse(500, {}, data).error),
        DesktopError,
    ),
    "images of desktops": Decoder(
        st.one_of(st.binary(), *(damaged(_make_image(name)) for name in (*DEFAULT_FORMATS, *OPTIONAL_FORMATS))),
        lambda data: check_image(image_decoding.decode_image(data, (*DEFAULT_FORMATS, *OPTIONAL_FORMATS))),
        image_decoding.ImageError,
    ),
    "tasks": Decoder(
        st.one_of(
            st.binary(), damaged(TASK), nested_values().map(lambda value: json.dumps(value, default=str).encode())
        ),
        lambda data: parse_task(data, "task"),
        UserError,
    ),
}


def decode(decoder: Decoder, data: Any) -> None:
    """Decode data; the documented error is allowed, any other exception fails the test."""
    with contextlib.suppress(decoder.error):
        decoder.decode(data)
