"""Interface of an action language: how a policy is prompted, how its responses are written, and its coordinates.

Thought: The form is filled in, so I press Submit.
Action: click(start_box='(412,230)')
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from deskrl.actor.actions import Action
from deskrl.core.config import AgentConfig

RELATIVE_RANGE = 1000
"""Upper end of relative coordinates, which start at 0, in both directions and for every screenshot size."""


class FormatError(ValueError):
    """The text does not contain exactly one valid action; the message says why."""


class InitialPrompt(NamedTuple):
    """Text of a conversation before its first screenshot."""

    system: str
    user: str


@dataclass(frozen=True)
class PolicyResponse:
    """Parsed response of a policy: its thought and one action."""

    thought: str
    action: Action
    starts_at_pointer: bool = False
    """The action starts where the pointer is, because the response has no point; `x` and `y` have no meaning."""


class ActionLanguage(ABC):
    """Action language. It holds no state of an episode; points are in its own coordinates, not in screen pixels.

    A class may have an attribute `Options`, a pydantic model of the keys of `agent.action_language_options`.

    Args:
        options: instance of `Options`; None if there is none.
    """

    title: ClassVar[str]
    """Name for users."""
    architectures: ClassVar[tuple[str, ...]] = ()
    """Model architectures whose published models use this language; empty: any. `model.build` builds the first."""
    has_relative_coordinates: ClassVar[bool] = True
    """Whether coordinates are thousandths of the screenshot; otherwise they are pixels of the screenshot as the model
    sees it, and the image processor must scale screenshots to the size `coordinate_range`."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def initial_prompt(self, config: AgentConfig, instruction: str) -> InitialPrompt:
        """Return the prompt of a conversation about a task, unless `agent.prompt` or `agent.prompt_file` replace it.

        Args:
            config: section `agent` of the run configuration.
            instruction: instruction of the task, which is literal text.
        """

    @abstractmethod
    def parse(self, text: str, coordinate_range: tuple[int, int]) -> PolicyResponse:
        """Parse a response in time linear in its length; never evaluate it as code.

        Args:
            text: response of the policy, without special tokens.
            coordinate_range: upper ends of x and y coordinates. Points outside are rejected by the caller.

        Raises:
            FormatError: the text does not contain exactly one valid action. The message is one short line.
        """

    @abstractmethod
    def render(self, response: PolicyResponse) -> str:
        """Return the text that parses to `response`, for a demonstration.

        Durations of WAIT and distances of SCROLL may be lost.

        Raises:
            ValueError: the language cannot express the action.
        """

    def coordinate_range(self, width: int, height: int) -> tuple[int, int]:
        """Return the upper ends of x and y coordinates on a screenshot of this size in pixels."""
        return RELATIVE_RANGE, RELATIVE_RANGE

    def restore_markup(self, text: str) -> str:
        """Return the text of a response with the special tokens that decoding has dropped, for the next prompts."""
        return text


class ToolApiLanguage(ActionLanguage):
    """Action language of an API that gets the definitions of its tools as data, for evaluations of external servers."""

    api: ClassVar[str]
    """Value of `inference.external_api` that the language belongs to."""

    @abstractmethod
    def api_instructions(self, config: AgentConfig) -> str:
        """Return the system prompt for the API: the initial prompt without the syntax of actions."""

    @abstractmethod
    def tools(self, width: int, height: int) -> list[dict[str, Any]]:
        """Return the definitions of the tools for screenshots of this size in pixels."""

    def coordinate_range(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of the screenshot as it is sent, which must be within the limits of the model."""
        return width, height
