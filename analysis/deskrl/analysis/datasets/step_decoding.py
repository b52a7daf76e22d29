"""Decoding of the recorded steps of an episode: screenshots of one size, and actions in pixels on that screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.conversation import start_at_pointer
from deskrl.actor.guest.keysyms import key_name
from deskrl.actor.image_decoding import ImageError, decode_image
from deskrl.analysis.datasets.recorded_episode import RecordedStep, UnreadableError
from deskrl.core.left_out import LeftOut

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class DecodedStep:
    """A recorded step whose screenshot and action were read."""

    recorded: RecordedStep
    action: Action
    png: bytes
    screen_size: tuple[int, int]


def decode_steps(steps: Sequence[RecordedStep], left_out: LeftOut) -> list[DecodedStep]:
    """Return the steps that can be read, up to the action that ends the episode, and count the others."""
    decoder = _StepDecoder()
    decoded = []
    for step in steps:
        try:
            decoded.append(decoder.decode(step))
        except UnreadableError as error:
            detail = f" ({error.detail})" if error.detail else ""
            left_out.add("step", error.reason, step.name + detail)
    return decoded


class _StepDecoder:
    """Decodes the steps of one episode, and keeps what a step depends on: the screen size and the pointer."""

    def __init__(self) -> None:
        self._screen_size: tuple[int, int] | None = None
        self._pointer: tuple[int, int] | None = None
        self._is_pointer_known = True
        self._has_ended = False

    def decode(self, step: RecordedStep) -> DecodedStep:
        """Decode the next step; raises UnreadableError."""
        if self._has_ended:
            raise UnreadableError("it follows the action that ends the episode")
        is_pointer_known, self._is_pointer_known = self._is_pointer_known, False  # until this step was decoded
        png, size = _decode_screenshot(step.read_screenshot())
        if self._screen_size not in (None, size):
            raise UnreadableError("its screenshot has another size than the first", f"{size[0]} x {size[1]}")
        try:
            action = self._place(step.read_action(size), size, is_pointer_known)
        except FormatError as error:
            raise UnreadableError("its action is none that deskrl has", str(error)) from error
        _check_action(action, size)
        self._screen_size = size
        self._has_ended = action.ends_episode
        self._is_pointer_known = is_pointer_known or action.has_point
        if action.has_point:
            self._pointer = (action.end_x, action.end_y) if action.kind is ActionKind.DRAG else (action.x, action.y)
        return DecodedStep(step, action, png, size)

    def _place(self, response: PolicyResponse, screen_size: tuple[int, int], is_pointer_known: bool) -> Action:
        """Return the action of a response with a point, if its kind has one."""
        if not response.starts_at_pointer:
            return response.action
        if not is_pointer_known:
            raise UnreadableError("its point depends on a step that was left out")
        return start_at_pointer(response.action, self._pointer, screen_size)


def _decode_screenshot(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """Return a screenshot as PNG, and its (width, height) in pixels."""
    try:
        image = decode_image(data)
    except ImageError as error:
        raise UnreadableError("its screenshot cannot be decoded", str(error)[:80]) from error
    if data.startswith(_PNG_SIGNATURE):
        return data, image.size
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), image.size


def _check_action(action: Action, screen_size: tuple[int, int]) -> None:
    """Raise UnreadableError if a desktop of this screen size could not execute the action."""
    width, height = screen_size
    points = [(action.x, action.y), (action.end_x, action.end_y)] if action.has_point else []
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UnreadableError("its point is outside the screenshot", f"({x}, {y})")
    for key in action.keys:
        if key_name(key) != key:
            raise UnreadableError("its action is none that deskrl has", f"unknown key {key[:20]!r}")
