"""Prompts: system prompt and first user message of a conversation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from deskrl.actor.agent.action_language import ActionLanguage, InitialPrompt
from deskrl.core.config import AgentConfig
from deskrl.core.errors import UserError

_INSTRUCTION = "{instruction}"
_BRIEF_SYSTEM = "Use the computer."
_TEMPLATE_SYSTEM = "You are a helpful assistant."


def initial_prompt(language: ActionLanguage, config: AgentConfig, instruction: str) -> InitialPrompt:
    """Return the prompt of a conversation about a task.

    Args:
        language: action language of the policy.
        config: configuration of the agent.
        instruction: instruction of the task.

    Raises:
        UserError: see `read_template`.
    """
    if config.prompt == "brief":
        return InitialPrompt(_BRIEF_SYSTEM, instruction)
    if config.prompt_file is not None:
        text = read_template(config.prompt_file).replace("{language}", config.language)
        return InitialPrompt(_TEMPLATE_SYSTEM, text.replace(_INSTRUCTION, instruction))
    return language.initial_prompt(config, instruction)


@cache
def read_template(path: Path) -> str:
    """Read a prompt template from `agent.prompt_file`.

    Raises:
        UserError: the file cannot be read, or does not contain `{instruction}`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "set agent.prompt_file to a UTF-8 text file") from error
    if _INSTRUCTION not in text:
        hint = f"write {_INSTRUCTION} where the instruction of the task belongs"
        raise UserError(f"{path}: has no {_INSTRUCTION}, so the prompt would not contain the task", hint)
    return text
