"""Registry of the action languages, and the language of a run."""

from __future__ import annotations

from typing import Any

from deskrl.actor.agent.action_language import ActionLanguage
from deskrl.actor.agent.anthropic_computer_use import AnthropicComputerUse
from deskrl.actor.agent.openai_computer_use import OpenAIComputerUse
from deskrl.actor.agent.opencua import OpenCUA
from deskrl.actor.agent.qwen_computer_use import Qwen3VLComputerUse, Qwen25VLComputerUse
from deskrl.actor.agent.ui_tars import UiTars2, UiTars10, UiTars15
from deskrl.core.config import AgentConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError
from deskrl.core.registry import Registry, subclass_problem


def _find_problem(found: Any) -> str | None:
    if problem := subclass_problem(found, ActionLanguage):
        return problem
    return None if isinstance(getattr(found, "title", None), str) else "it has no title"


ACTION_LANGUAGES: Registry[type[ActionLanguage]] = Registry(
    "action language", "agent.action_language", "deskrl.action_languages", _find_problem
)
ACTION_LANGUAGES.register("ui_tars_1_0")(UiTars10)
ACTION_LANGUAGES.register("ui_tars_1_5")(UiTars15)
ACTION_LANGUAGES.register("ui_tars_2")(UiTars2)
ACTION_LANGUAGES.register("qwen3_vl")(Qwen3VLComputerUse)
ACTION_LANGUAGES.register("qwen2_5_vl")(Qwen25VLComputerUse)
ACTION_LANGUAGES.register("opencua")(OpenCUA)
ACTION_LANGUAGES.register("anthropic_computer_use")(AnthropicComputerUse)
ACTION_LANGUAGES.register("openai_computer_use")(OpenAIComputerUse)


def select_language(config: AgentConfig) -> ActionLanguage:
    """Return the action language of a configuration.

    Raises:
        UserError: the language is unknown or cannot be created, or it rejects the options.
    """
    selected = ACTION_LANGUAGES.select(config.action_language, config.action_language_options)
    try:
        return selected.implementation(selected.options)
    except Exception as error:  # a language of the user's own may raise anything
        problem = f"cannot be created: {typed_line(error)}"
        raise UserError(f"agent.action_language: {config.action_language}: {problem}", "correct the class") from error
