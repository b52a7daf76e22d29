"""Agent and conversation: build the policy's prompts from screenshots, and parse its responses into actions.

Inference owns tokenisation: sampled responses are kept as token ids and never tokenised again.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import ActionLanguage, FormatError, PolicyResponse
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.prompts import initial_prompt, read_template
from deskrl.core.config import AgentConfig
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import common_pb2, inference_pb2


@dataclass(frozen=True)
class ChatPrompt:
    """Prompt for one action."""

    messages: list[inference_pb2.ChatMessage]
    images: tuple[str, ...]
    """Hashes of the screenshots in the messages, in order."""


class Conversation(ABC):
    """Conversation of one episode. Each step calls `observe`, `prompt` and `respond`."""

    @abstractmethod
    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        """Add a screenshot, and return the image that the policy sees: scaled, encoded as PNG, named by its hash.

        A screenshot without a response is replaced by the next one.
        """

    @abstractmethod
    def prompt(self) -> ChatPrompt:
        """Return the prompt for the next action. It ends with the last observation."""

    @abstractmethod
    def respond(self, response: str | Sequence[int]) -> None:
        """Add the policy's response: token ids exactly as sampled, or the text of a script or an external server."""

    @abstractmethod
    def parse(self, text: str) -> PolicyResponse:
        """Parse a response to the last observation; points are in screen pixels.

        Raises:
            FormatError: the text is not a response with one valid action.
        """

    @abstractmethod
    def render(self, response: PolicyResponse) -> str:
        """Return the text of a response whose points are in screen pixels, for a demonstration."""


class Agent:
    """Prompt format and action language of a policy. It holds no state of an episode.

    Args:
        config: section `agent` of the run configuration.

    Raises:
        UserError: the action language cannot be used, or `agent.prompt_file` is not a valid prompt template.
    """

    def __init__(self, config: AgentConfig) -> None:
        if config.prompt_file is not None:
            read_template(config.prompt_file)
        self._config = config
        self._language = select_language(config)

    def start_conversation(self, instruction: str) -> Conversation:
        """Return a new conversation about a task."""
        return _LanguageConversation(self._language, self._config, instruction)


def num_prompt_characters(config: AgentConfig) -> int:
    """Return the length in characters of the prompt before the first screenshot, without the task's instruction."""
    messages = Agent(config).start_conversation("").prompt().messages
    return sum(len(content.text) for message in messages for content in message.contents)


class _LanguageConversation(Conversation):
    """Conversation in an action language."""

    def __init__(self, language: ActionLanguage, config: AgentConfig, instruction: str) -> None:
        initial = initial_prompt(language, config, instruction)
        self._config = config
        self._language = language
        self._initial = [
            _message(inference_pb2.MESSAGE_ROLE_SYSTEM, text=initial.system),
            _message(inference_pb2.MESSAGE_ROLE_USER, text=initial.user),
        ]
        self._images: list[str] = []
        self._responses: list[inference_pb2.ChatMessage] = []
        self._screen_size = (0, 0)
        self._coordinate_range = (0, 0)
        self._pointer: tuple[int, int] | None = None

    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        size = (self._config.image_width or screenshot.width, self._config.image_height or screenshot.height)
        self._screen_size = screenshot.size
        self._coordinate_range = self._language.coordinate_range(*size)
        image = _encode(screenshot if size == screenshot.size else screenshot.resize(size, Image.Resampling.BICUBIC))
        self._images[len(self._responses) :] = [image.hash]
        return image

    def prompt(self) -> ChatPrompt:
        """Return all responses, each after its screenshot if `agent.context` keeps it."""
        first = self._config.num_dropped_images(len(self._images))
        messages = list(self._initial)
        for index, name in enumerate(self._images):
            if index >= first:
                messages.append(_message(inference_pb2.MESSAGE_ROLE_USER, image_hash=name))
            if index < len(self._responses):
                messages.append(self._responses[index])
        return ChatPrompt(messages, tuple(self._images[first:]))

    def respond(self, response: str | Sequence[int]) -> None:
        role = inference_pb2.MESSAGE_ROLE_ASSISTANT
        if isinstance(response, str):
            self._responses.append(_message(role, text=self._language.restore_markup(response)))
        else:
            self._responses.append(_message(role, token_ids=inference_pb2.TokenIds(ids=response)))

    def parse(self, text: str) -> PolicyResponse:
        width, height = self._coordinate_range
        response = self._language.parse(text, (width, height))
        action = response.action
        for x, y in ((action.x, action.y), (action.end_x, action.end_y)):
            if not (0 <= x <= width and 0 <= y <= height):
                frame = "the coordinate range" if self._language.has_relative_coordinates else "the image"
                raise FormatError(f"({x},{y}) is outside {frame} of {width}×{height}")
        action = map_points(action, self._coordinate_range, self._screen_size)
        if response.starts_at_pointer:
            action = start_at_pointer(action, self._pointer, self._screen_size)
        if action.has_point:
            self._pointer = (action.end_x, action.end_y) if action.kind is ActionKind.DRAG else (action.x, action.y)
        return PolicyResponse(response.thought, action)

    def render(self, response: PolicyResponse) -> str:
        action = map_points(response.action, self._screen_size, self._coordinate_range)
        return self._language.render(replace(response, action=action))


def start_at_pointer(action: Action, pointer: tuple[int, int] | None, screen_size: tuple[int, int]) -> Action:
    """Return an action without a point at the position of the pointer, in screen pixels.

    A scroll turns the wheel at the centre if no action has moved the pointer yet.

    Raises:
        FormatError: the position of the pointer is not known, and the action is not a scroll.
    """
    if pointer is None and action.kind is not ActionKind.SCROLL:
        raise FormatError(f"{action.kind} has no point, and no earlier action has moved the pointer")
    x, y = pointer or (screen_size[0] // 2, screen_size[1] // 2)
    return replace(action, x=x, y=y)


def map_points(action: Action, source: tuple[int, int], target: tuple[int, int]) -> Action:
    """Scale the points of an action from one frame size to another. Points on the far edge are kept inside."""
    return replace(
        action,
        x=min(round(action.x * target[0] / source[0]), target[0] - 1),
        y=min(round(action.y * target[1] / source[1]), target[1] - 1),
        end_x=min(round(action.end_x * target[0] / source[0]), target[0] - 1),
        end_y=min(round(action.end_y * target[1] / source[1]), target[1] - 1),
    )


def _encode(image: Image.Image) -> common_pb2.Image:
    """Encode as PNG at the fastest level, because a screenshot is encoded in each step but read only once or twice."""
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
