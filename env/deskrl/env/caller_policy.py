"""Policy whose actions the caller of an environment gives, and the conversation that takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import ChatPrompt, Conversation, map_points
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.guest.keysyms import key_name
from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2

MAX_WAIT_S = 60.0
"""Longest duration of a wait or of a key press, in seconds."""


def check_action(action: Action, size: tuple[int, int]) -> None:
    """Raise UserError if an action cannot be executed.

    Args:
        action: action with points in pixels of the screenshot.
        size: (width, height) of the screenshot in pixels.
    """
    points = [(action.x, action.y)] if action.has_point else []
    if action.kind is ActionKind.DRAG:
        points.append((action.end_x, action.end_y))
    for x, y in points:
        if not (0 <= x < size[0] and 0 <= y < size[1]):
            hint = f"give x from 0 to {size[0] - 1} and y from 0 to {size[1] - 1}"
            raise UserError(f"{action.kind}: ({x}, {y}) is outside the screenshot of {size[0]}x{size[1]} pixels", hint)
    if action.kind is ActionKind.HOTKEY and not action.keys:
        raise UserError("hotkey: no keys", 'give keys, such as ["ctrl", "s"]')
    if unknown := [key for key in action.keys if key_name(key) is None]:
        hint = "give characters or names of keys, such as ctrl, enter, left or f5"
        raise UserError(f"{action.kind}: {unknown[0]!r} is not a key", hint)
    if not 0 <= action.seconds <= MAX_WAIT_S:
        raise UserError(f"{action.kind}: {action.seconds} s is not a duration", f"give 0 to {MAX_WAIT_S:g} seconds")


class CallerConversation(Conversation):
    """Conversation that takes actions as they are, and texts in the action language of the run.

    Args:
        conversation: conversation in the action language.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._action: Action | None = None
        self._screen_size = (0, 0)

    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        """Add a screenshot (see the base class)."""
        self._screen_size = screenshot.size
        return self._conversation.observe(screenshot)

    def prompt(self) -> ChatPrompt:
        """Return the prompt of the conversation in the action language."""
        return self._conversation.prompt()

    def respond(self, response: str | Sequence[int]) -> None:
        """Add a response in the action language."""
        self._action = None
        self._conversation.respond(response)

    def respond_with(self, action: Action, image_size: tuple[int, int]) -> None:
        """Add an action whose points are pixels of the image that `observe` returned."""
        self._action = map_points(action, image_size, self._screen_size)
        self._conversation.respond(str(action.to_record()))

    def parse(self, text: str) -> PolicyResponse:
        """Return the action of `respond_with`, or parse the text of `respond`."""
        if self._action is not None:
            return PolicyResponse("", self._action)
        return self._conversation.parse(text)

    def render(self, response: PolicyResponse) -> str:
        """Return the text of a response in the action language."""
        return self._conversation.render(response)


class CallerPolicy(ActorPolicy):
    """Policy of one episode whose decisions are the arguments of `answer`. It belongs to one event loop.

    Args:
        image_size: (width, height) of screenshots in pixels, as the policy sees them.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._image_size = image_size
        self._answers: asyncio.Queue[Action | str] = asyncio.Queue()
        self.is_asked = asyncio.Event()
        """Set while the episode waits for an action."""

    def answer(self, answer: Action | str) -> None:
        """Give the next action: with points in pixels of the screenshot, or as text in the action language."""
        self.is_asked.clear()
        self._answers.put_nowait(answer)

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Wait for the caller's action (see the base class)."""
        assert isinstance(conversation, CallerConversation)
        self.is_asked.set()
        answer = await self._answers.get()
        images = conversation.prompt().images
        if isinstance(answer, Action):
            conversation.respond_with(answer, self._image_size)
            text = ""
        else:
            conversation.respond(answer)
            text = answer
        step = Step(index=index, screenshot=screenshot.hash, images=images, text=text)
        return Decision(step, {})
