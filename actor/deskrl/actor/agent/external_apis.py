"""Selection of the external policy by the protocol of the server (`inference.external_api`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from deskrl.actor.agent.action_language import ToolApiLanguage
from deskrl.actor.agent.anthropic_messages import AnthropicMessagesPolicy
from deskrl.actor.agent.external_policy import ExternalClient, ToolApiPolicy
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.openai_responses import OpenAIResponsesPolicy
from deskrl.actor.agent.policies import ActorPolicy
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import rollout_pb2

_POLICIES: dict[str, type[ToolApiPolicy]] = {
    "anthropic_messages": AnthropicMessagesPolicy,
    "openai_responses": OpenAIResponsesPolicy,
}


def policy_opener(config: RunConfig) -> Callable[[rollout_pb2.Rollout], ActorPolicy]:
    """Return the function that opens the external policy of a configuration for a rollout."""
    client = ExternalClient(config.inference, config.actor.act_timeout_s)
    policy = _POLICIES.get(config.inference.external_api)
    if policy is None:
        return client.open_policy
    language = select_language(config.agent)
    assert isinstance(language, ToolApiLanguage), "language_checks.check_language has checked it"
    return partial(policy, client, language, config.agent)
