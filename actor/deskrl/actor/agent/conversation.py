"""What the policy is told and shown, and what its words mean: an `Agent` and the conversation of one episode.

Knows prompts, context and coordinates. Knows no tokens (inference owns tokenisation; what was sampled is carried as
ids), no desktop and no task beyond its instruction.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.grammar import FormatError, Turn, parse_turn, render_turn, with_marks
from deskrl.actor.agent.prompts import opening, read_template
from deskrl.core.config import AgentConfig
from deskrl.core.families import FAMILIES
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import common_pb2, inference_pb2


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked: the conversation, and the hashes of its screenshots in order."""

    messages: list[inference_pb2.ChatMessage]
    images: tuple[str, ...]


class Conversation(ABC):
    """One episode as the policy experiences it: `observe`, `prompt`, `respond`, and again."""

    @abstractmethod
    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        """Add what is on the screen; returns it as the policy will see it, scaled, encoded and named."""

    @abstractmethod
    def prompt(self) -> Prompt:
        """The prompt for the next action, the last observation at its end."""

    @abstractmethod
    def respond(self, said: str | Sequence[int]) -> None:
        """Add the policy's answer: token ids exactly as sampled, or text where a script or an external server spoke."""

    @abstractmethod
    def parse(self, text: str) -> Turn:
        """What an answer to the last observation means, in screen pixels; raises FormatError if nothing."""

    @abstractmethod
    def render(self, turn: Turn) -> str:
        """The answer that means `turn` (in screen pixels): a demonstration's text."""


class Agent(ABC):
    """A way of prompting and reading a policy. Holds no episode."""

    @abstractmethod
    def begin(self, instruction: str) -> Conversation:
        """A fresh conversation about a task."""


def make_agent(config: AgentConfig) -> Agent:
    """The agent that a configuration names; raises UserError for a prompt file that is none."""
    return UiTarsAgent(config)


def prompt_characters(config: AgentConfig) -> int:
    """How long the prompt is before the first screenshot, in characters, a task's instruction not counted."""
    opening = make_agent(config).begin("").prompt().messages
    return sum(len(content.text) for message in opening for content in message.contents)


class UiTarsAgent(Agent):
    """UI-TARS of any family: thought and action as text."""

    def __init__(self, config: AgentConfig) -> None:
        if config.prompt_file is not None:
            read_template(config.prompt_file)
        self._config = config

    def begin(self, instruction: str) -> Conversation:
        return _UiTarsConversation(self._config, instruction)


class _UiTarsConversation(Conversation):
    def __init__(self, config: AgentConfig, instruction: str) -> None:
        told = opening(config, instruction)
        self._config = config
        self._family = FAMILIES[config.family]
        self._opening = [
            _message(inference_pb2.MESSAGE_ROLE_SYSTEM, text=told.system),
            _message(inference_pb2.MESSAGE_ROLE_USER, text=told.user),
        ]
        self._images: list[str] = []
        self._answers: list[inference_pb2.ChatMessage] = []
        self._screen = (0, 0)
        self._span = (0, 0)

    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        sent = (self._config.image_width or screenshot.width, self._config.image_height or screenshot.height)
        self._screen = screenshot.size
        self._span = self._family.span(*sent)
        image = _encode(screenshot if sent == screenshot.size else screenshot.resize(sent, Image.Resampling.BICUBIC))
        self._images.append(image.hash)
        return image

    def prompt(self) -> Prompt:
        """All answers, each after its screenshot; under the context `window` only the last screenshots stay."""
        num_images = len(self._images)
        first = max(0, num_images - self._config.window_images) if self._config.context == "window" else 0
        messages = list(self._opening)
        for index, name in enumerate(self._images):
            if index >= first:
                messages.append(_message(inference_pb2.MESSAGE_ROLE_USER, image_hash=name))
            if index < len(self._answers):
                messages.append(self._answers[index])
        return Prompt(messages, tuple(self._images[first:]))

    def respond(self, said: str | Sequence[int]) -> None:
        role = inference_pb2.MESSAGE_ROLE_ASSISTANT
        if isinstance(said, str):
            self._answers.append(_message(role, text=with_marks(said, self._config.family)))
        else:
            self._answers.append(_message(role, token_ids=inference_pb2.TokenIds(ids=said)))

    def parse(self, text: str) -> Turn:
        turn = parse_turn(text)
        for x, y in ((turn.action.x, turn.action.y), (turn.action.end_x, turn.action.end_y)):
            if not (0 <= x <= self._span[0] and 0 <= y <= self._span[1]):
                frame = "coordinates" if self._family.relative else "the image"
                raise FormatError(f"({x},{y}) is outside {frame} of {self._span[0]}×{self._span[1]}")
        return replace(turn, action=_map_points(turn.action, self._span, self._screen))

    def render(self, turn: Turn) -> str:
        action = _map_points(turn.action, self._screen, self._span)
        return render_turn(replace(turn, action=action), self._config.family)


def _map_points(action: Action, source: tuple[int, int], target: tuple[int, int]) -> Action:
    """The same action in another frame; a point on the far edge stays inside it."""
    return replace(
        action,
        x=min(round(action.x * target[0] / source[0]), target[0] - 1),
        y=min(round(action.y * target[1] / source[1]), target[1] - 1),
        end_x=min(round(action.end_x * target[0] / source[0]), target[0] - 1),
        end_y=min(round(action.end_y * target[1] / source[1]), target[1] - 1),
    )


def _encode(image: Image.Image) -> common_pb2.Image:
    """PNG at the fastest level: a screenshot is encoded for every step and read once or twice."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    data = buffer.getvalue()
    return common_pb2.Image(hash=image_hash(data), data=data)


def _message(
    role: inference_pb2.MessageRole,
    *,
    text: str | None = None,
    image_hash: str | None = None,
    token_ids: inference_pb2.TokenIds | None = None,
) -> inference_pb2.ChatMessage:
    content = inference_pb2.Content(text=text, image_hash=image_hash, token_ids=token_ids)
    return inference_pb2.ChatMessage(role=role, contents=[content])
